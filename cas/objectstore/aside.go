package objectstore

import (
	"hash"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// asideHash computes the hash of a large blob beside what else is done with its chunks: to hash them
// takes as long as to send them. It belongs to one goroutine, which must call wait at the end.
type asideHash struct {
	hash    hash.Hash
	running *errgroup.Group // nil when nothing runs
}

func newAsideHash(f digest.Function) *asideHash { return &asideHash{hash: f.New()} }

// write takes the next bytes, which must not change until the next call of any method has returned.
func (h *asideHash) write(p []byte) {
	h.wait()
	h.running = new(errgroup.Group)
	h.running.Go(func() error {
		_, err := h.hash.Write(p)
		return err
	})
}

// wait returns when all bytes are hashed.
func (h *asideHash) wait() {
	if h.running != nil {
		h.running.Wait() //nolint:errcheck // a hash never fails
		h.running = nil
	}
}

// sum is the digest of all bytes, of which there are so many.
func (h *asideHash) sum(space digest.Space, size int64) digest.Digest {
	h.wait()
	return space.Sum(h.hash, size)
}
