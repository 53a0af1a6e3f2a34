// Package frontend is the farm's REAPI endpoint: Capabilities, ContentAddressableStorage, ByteStream,
// ActionCache, Execution, google.longrunning.Operations, health and reflection.
//
// It holds no state. Blobs are in the cas.Store, results in the action cache, operations in the
// broker, so any frontend answers any call and a dead one is replaced by the next. What it promises
// is the contract with clients: every request is checked before it costs anything, every size, count
// and time that a client chooses is bounded (limits.go), a call ends soon after its client is gone,
// and each error has the code that makes clients do the right thing next (status.go).
//
// A handler returns plain errors; the outermost interceptor turns them into gRPC statuses. No handler
// starts a goroutine for a stream: an upload is an io.Reader for Store.Put, a download an io.Writer
// for the blob's reader, and an Execute stream a loop over broker.Client.Watch.
//
// Locks: waiters.mu only, never held across a call.
package frontend
