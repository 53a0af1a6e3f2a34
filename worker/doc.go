// Package worker executes actions: it takes leases from the queue, one for each free slot, and turns
// each into exactly one terminal state or gives it back.
//
// A job goes through the stages fetch (action, command and input tree are read and checked), layout
// (the inputs become files), run, collect, upload (blobs, then the action cache) and settle. A slot is
// held until collect is over; what follows goes on beside the next job. Every stage is bounded, so is
// the number of jobs, and a job ends early when its lease is lost, its operation cancelled or the
// worker told to stop.
//
// What is a client's doing becomes an ExecuteResponse: a malformed action is INVALID_ARGUMENT, missing
// inputs are FAILED_PRECONDITION with one violation each, a timeout is DEADLINE_EXCEEDED with what the
// action had written so far, any exit code is OK. What is the farm's doing (a storage that does not
// answer, a full disk, a sandbox that can't be set up) never is: the job goes back to the queue for
// another worker, and after broker.MaxAttempts ends as UNAVAILABLE.
//
// Blobs are durable before the action cache names them, and both before the operation is settled, so a
// worker that dies between two of these steps leaves nothing that a second attempt does not mend. Only
// complete results with exit code 0 enter the action cache.
//
// The parts that need no farm are packages of their own: inputs, sandbox and outputs.
package worker
