// Package broker is the farm's use of NATS: the embedded server, the connections, the streams, and
// on top of them operations, their queue and their status.
//
// It promises that an operation which Submit accepted ends in exactly one terminal state, whatever
// dies in between, and that every watcher sees that state.
//
// An operation has three traces. Its record is the last message of its subject in the stream
// OPERATIONS and is written only by compare-and-set on the stream sequence, so a state that was
// overtaken can never be stored and the first terminal state wins. Its job is a message of the
// work-queue stream JOBS, which keeps one message per operation until a worker has acknowledged it.
// Its flight is the last message of the action's subject in the stream FLIGHTS and makes equal
// actions share one operation while it runs. They are written in the order flight, record, job and
// settled in the order record, flight, job, and each step may be repeated. What is left undone is found by
// whoever needs it next, and else by one process of the farm that looks for it (reconcile.go).
//
// Watchers do not consume from JetStream. The server republishes each stored record to a subject of
// core NATS, together with its sequence; a watcher subscribes, reads the record once and then keeps
// only the newest state it has seen (watch.go). Workers pull jobs without waiting and sleep on a
// doorbell (queue.go).
//
// Lock order: hub.mu and topic state are one lock; no lock of this package is held while another is
// taken or while anything is sent or received.
package broker
