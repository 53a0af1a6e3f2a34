// Package upstream puts another cache of the Remote Execution API behind the farm: what the farm does
// not have is read through it, what the farm stores is copied to it, and when it is slow, silent or
// gone the farm goes on without it.
//
// A Client is that cache as a cas.Store. It knows from GetCapabilities what the other side can do, asks
// again in the background, bounds every call by progress and not by its length, and stops calling a
// side that does not answer until a probe finds it well again. A key space of the farm is the
// instance of the same name below the instance of the upstream's address, so that instances stay apart.
//
// A Tier is the farm's own store with the upstream behind it. Only the farm's store decides what is
// present: a blob that was reported present is durable here. A blob that is absent here is fetched
// once for all who ask for it, and streamed to them while it is stored; the fetch ends with the last
// of them, whoever was first. A slow one among them is set aside and goes on from the stored copy.
// When the upstream says that it has no such blob, is known to be down or refuses, the blob is
// cas.ErrNotFound, as it would be without an upstream: clients then build or upload it. A read that
// fails while the upstream counts as well is cas.ErrUnavailable, which clients repeat.
//
// Actions is the same for the action cache. A result of the upstream is served when each blob it names
// is here or there; those blobs are promised, fetched in the background, and a question for one of
// them waits for it. A failing upstream is a miss. What clients execute or store is copied to the
// upstream after its blobs, by bounded queues that drop what does not fit.
package upstream
