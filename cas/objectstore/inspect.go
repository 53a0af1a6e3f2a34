package objectstore

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Blob is a blob as the store has it.
type Blob struct {
	Digest     digest.Digest
	Generation uint32
	// Stream is the stream that holds it.
	Stream string
}

// errEnough is the cause of a context that ended a listing whose reader has had enough.
var errEnough = errors.New("the listing was ended")

// Walk calls f with every blob whose hash begins with prefix, in no order that means anything, until f
// returns an error, which Walk returns. A blob that several generations have comes once, in the newest.
// The listing is read page by page, so its length costs no memory. What is stored or dropped during
// it may come or not.
func (s *Store) Walk(ctx context.Context, prefix string, f func(Blob) error) error {
	ctx, enough := context.WithCancelCause(ctx)
	defer enough(errEnough)
	var failed error
	for _, g := range s.generations() {
		for _, b := range g.buckets() {
			visit := func(d digest.Digest, ok bool) {
				if failed != nil || !ok || !strings.HasPrefix(d.Hash(), prefix) || !s.newest(b, d) {
					return
				}
				if failed = f(Blob{Digest: d, Generation: b.generation, Stream: b.stream}); failed != nil {
					enough(errEnough)
				}
			}
			err := s.walk(ctx, b, prefix, visit)
			if failed != nil {
				return failed
			}
			if err != nil {
				return fmt.Errorf("list %s: %w", b.stream, err)
			}
		}
	}
	return nil
}

func (s *Store) walk(ctx context.Context, b *bucket, prefix string, visit func(d digest.Digest, ok bool)) error {
	if b.family == large {
		return s.bulk.subjects(ctx, b.stream, b.metas+">", func(subject string) {
			visit(parseMeta(strings.TrimPrefix(subject, b.metas)))
		})
	}
	for hh := range 256 {
		begin := fmt.Sprintf("%02x", hh)
		if !strings.HasPrefix(begin, prefix) && !strings.HasPrefix(prefix, begin) {
			continue
		}
		err := s.small.subjects(ctx, b.stream, b.chunks+begin+".>", func(subject string) {
			visit(parseChunk(strings.TrimPrefix(subject, b.chunks)))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// newest tells whether the index knows the blob from no other generation than this bucket's.
func (s *Store) newest(b *bucket, d digest.Digest) bool {
	e, known := s.index.get(keyOf(d), d.Size())
	return familyOf(d) == b.family && (!known || e.generation() == b.generation)
}

// Stat tells where a blob is, without making it stay longer. The error wraps cas.ErrNotFound.
func (s *Store) Stat(ctx context.Context, d digest.Digest) (Blob, error) {
	if d.IsEmpty() {
		return Blob{Digest: d}, nil
	}
	e, known := s.index.get(keyOf(d), d.Size())
	if !known && !d.IsImpossible() {
		found, err := s.find(ctx, d)
		if err != nil {
			return Blob{}, fmt.Errorf("look for %v: %w", d, err)
		}
		if found {
			e, known = s.index.get(keyOf(d), d.Size())
		}
	}
	if g := s.generation(e.generation()); known && g != nil && g.bucket(d) != nil {
		return Blob{Digest: d, Generation: g.number, Stream: g.bucket(d).stream}, nil
	}
	return Blob{}, fmt.Errorf("%w: %v", cas.ErrNotFound, d)
}

// Counts returns how many blobs the index knows, by generation.
func (s *Store) Counts() map[uint32]int {
	counts := make(map[uint32]int)
	for _, g := range s.generations() {
		counts[g.number] = 0
	}
	s.index.each(func(e entry) { counts[e.generation()]++ })
	return counts
}

// GenerationOf returns the generation that a stream belongs to. Streams of other parts are not ok.
func GenerationOf(stream string) (number uint32, ok bool) {
	_, number, _, ok = parseStream(stream)
	return number, ok
}

// Remove deletes a blob of at most 512 KiB from all generations. It is for blobs that nobody was
// promised: who was told that it is present loses it.
func (s *Store) Remove(ctx context.Context, d digest.Digest) error {
	if familyOf(d) != small {
		return fmt.Errorf("remove %v: it is too large", d)
	}
	for _, g := range s.generations() {
		b := g.bucket(d)
		if b == nil {
			continue
		}
		for _, subject := range []string{b.meta(d), b.chunks + tail(d)} {
			if err := s.small.purge(ctx, b.stream, subject); err != nil {
				return fmt.Errorf("remove %v: %w", d, err)
			}
		}
	}
	s.forget(keyOf(d), s.generations()[0].number)
	return nil
}
