// Package cas is the contract of a content addressable storage and what works on any of them.
//
// A Store holds immutable blobs under their digests. It promises four things: what it reports as
// present is complete and was verified; what is not verified is never visible; a call returns soon
// after its context ends, whatever the other side does; and nothing is left behind by a call that
// failed. castest.Run is that contract as a test, and every implementation passes it.
//
// The implementations are sub-packages named after where the bytes are: objectstore (a JetStream
// object store, the farm's durable layer) and disk (files on the machine that reads them). The
// wrappers are files of this package, one each. Wrappers and stores are put together in one
// function of cmd/app.
package cas
