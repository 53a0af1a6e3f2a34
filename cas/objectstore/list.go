package objectstore

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"
)

// listWidth is how many listings are under way at the same time.
const listWidth = 8

// list adds what a generation holds to the index. The broker answers from memory. Small blobs are
// listed by their 256 prefixes, since the cost of a listing in pages grows with the square of its
// length.
func (s *Store) list(ctx context.Context, g *generation) error {
	group, bound := errgroup.WithContext(ctx)
	group.SetLimit(listWidth)
	for _, b := range g.buckets() {
		if b.family == large {
			group.Go(func() error { return s.listMetadata(bound, b) })
			continue
		}
		for hh := range 256 {
			group.Go(func() error { return s.listChunks(bound, b, fmt.Sprintf("%02x", hh)) })
		}
	}
	err := group.Wait()
	if err == nil {
		return nil
	}
	if v, e := s.ask(ctx); e == nil && g.number <= v.Dropped {
		return nil // there is nothing in it any more
	}
	return fmt.Errorf("list generation %d: %w", g.number, err)
}

// listChunks adds the small blobs whose hash begins with these digits.
func (s *Store) listChunks(ctx context.Context, b *bucket, hh string) error {
	return s.small.subjects(ctx, b.stream, b.chunks+hh+".>", func(subject string) {
		if d, ok := parseChunk(strings.TrimPrefix(subject, b.chunks)); ok && familyOf(d) == small {
			s.index.set(keyOf(d), newEntry(b, d.Size()))
		}
	})
}

// listMetadata adds the large blobs of a stream.
func (s *Store) listMetadata(ctx context.Context, b *bucket) error {
	return s.bulk.subjects(ctx, b.stream, b.metas+">", func(subject string) {
		if d, ok := parseMeta(strings.TrimPrefix(subject, b.metas)); ok && familyOf(d) == large && d.Size() <= maxSize {
			s.index.set(keyOf(d), newEntry(b, d.Size()))
		}
	})
}
