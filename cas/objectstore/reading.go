package objectstore

import (
	"context"
	"errors"
	"sync"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// readers are the reads of large blobs that go on. When the generation that one reads is aging, its blob
// is copied forward like any that is used, and the read goes on from there when the generation is
// dropped. So a slow reader keeps its blob, whatever comes in meanwhile.
//
// The rejected alternative, to keep a generation as long as something of it is read, would let one
// client that reads slowly fill the store.
type readers struct {
	mu   sync.Mutex
	open map[*largeReader]digest.Digest // guarded by mu
}

func newReaders() *readers { return &readers{open: make(map[*largeReader]digest.Digest)} }

func (r *readers) add(reader *largeReader, d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open[reader] = d
}

func (r *readers) remove(reader *largeReader) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, reader)
}

// blobs returns what is being read.
func (r *readers) blobs() []digest.Digest {
	r.mu.Lock()
	defer r.mu.Unlock()
	blobs := make([]digest.Digest, 0, len(r.open))
	for _, d := range r.open {
		blobs = append(blobs, d)
	}
	return blobs
}

// renew has what is being read copied forward where it is aging.
func (s *Store) renew() {
	for _, d := range s.readers.blobs() {
		s.touched(keyOf(d), d)
	}
}

// moved returns where a blob is whose bucket went with its generation, or the error that the read of
// that bucket ended with.
func (s *Store) moved(ctx context.Context, b *bucket, d digest.Digest, cause error) (*bucket, object, error) {
	if !errors.Is(cause, cas.ErrUnavailable) || !s.isDropped(ctx, b) {
		return nil, object{}, cause
	}
	if found, err := s.find(ctx, d); err != nil || !found {
		return nil, object{}, cause
	}
	e, _ := s.index.get(keyOf(d), d.Size())
	g := s.generation(e.generation())
	if g == nil || g.bucket(d) == nil {
		return nil, object{}, cause
	}
	o, err := s.findObject(ctx, g.bucket(d), d, true)
	if err != nil || len(o.positions) != chunksOf(d) {
		return nil, object{}, cause
	}
	return g.bucket(d), o, nil
}

// isDropped tells whether the generation of a bucket, of which the broker knows nothing, was dropped.
func (s *Store) isDropped(ctx context.Context, b *bucket) bool {
	if ctx.Err() != nil {
		return false
	}
	v, err := s.ask(ctx)
	return err == nil && b.generation <= v.Dropped
}
