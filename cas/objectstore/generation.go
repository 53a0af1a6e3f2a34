package objectstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/keymap"
)

// generation is the streams that were current at the same time.
type generation struct {
	number uint32
	small  []*bucket // by shard; nil where the stream does not exist
	large  []*bucket
}

// bucket returns where the generation holds a blob of this digest, or nil.
func (g *generation) bucket(d digest.Digest) *bucket {
	buckets := g.small
	if familyOf(d) == large {
		buckets = g.large
	}
	if len(buckets) == 0 {
		return nil
	}
	return buckets[shardOf(d, len(buckets))]
}

// buckets returns all streams of the generation.
func (g *generation) buckets() []*bucket {
	return slices.DeleteFunc(slices.Concat(g.small, g.large), func(b *bucket) bool { return b == nil })
}

// shardOf spreads digests over n shards by their hash.
func shardOf(d digest.Digest, n int) int {
	hh := d.Hash()[2:4] // the first two digits spread subjects within a stream
	return int(keymap.Nibble(hh[0])<<4|keymap.Nibble(hh[1])) % n
}

// add puts a bucket into its place.
func (g *generation) add(b *bucket) {
	buckets := &g.small
	if b.family == large {
		buckets = &g.large
	}
	for len(*buckets) <= b.shard {
		*buckets = append(*buckets, nil)
	}
	(*buckets)[b.shard] = b
}

// findBucket returns the bucket of this stream, or nil.
func findBucket(gs []*generation, stream string) *bucket {
	for _, g := range gs {
		for _, b := range g.buckets() {
			if b.stream == stream {
				return b
			}
		}
	}
	return nil
}

// openGenerations finds the live generations by the names of their streams, newest first, and makes
// the streams of the newest complete. Those up to dropped are not alive, whatever there is of them.
// Without any it makes the one after dropped. Buckets that are known stay the same, since writers share
// their budget, and their streams are made only if they are gone.
func openGenerations(ctx context.Context, js jetstream.JetStream, cfg Config, known []*generation, dropped uint32) ([]*generation, error) {
	byNumber := make(map[uint32]*generation)
	open := func(f family, number uint32, shard int) *bucket {
		b := newBucket(f, number, shard, cfg.WriteBudget)
		if old := findBucket(known, b.stream); old != nil {
			return old
		}
		return b
	}
	names := js.StreamNames(ctx)
	for name := range names.Name() {
		f, number, shard, ok := parseStream(name)
		if !ok || number <= dropped {
			continue
		}
		if byNumber[number] == nil {
			byNumber[number] = &generation{number: number}
		}
		byNumber[number].add(open(f, number, shard))
	}
	if err := names.Err(); err != nil {
		return nil, fmt.Errorf("list streams: %w", err)
	}
	if len(byNumber) == 0 {
		byNumber[dropped+1] = &generation{number: dropped + 1}
	}
	live := make([]*generation, 0, len(byNumber))
	for _, g := range byNumber {
		live = append(live, g)
	}
	slices.SortFunc(live, func(a, b *generation) int { return int(b.number) - int(a.number) })

	return live, completeGeneration(ctx, js, cfg, live, known != nil, open)
}

// completeGeneration makes the streams that the newest generation lacks.
func completeGeneration(ctx context.Context, js jetstream.JetStream, cfg Config, live []*generation, opened bool, open func(family, uint32, int) *bucket) error {
	current := live[0]
	shards := max(1, len(current.small), len(current.large))
	for _, f := range []family{small, large} {
		for shard := range shards {
			b := open(f, current.number, shard)
			if opened && findBucket(live, b.stream) != nil {
				continue
			}
			if err := b.create(ctx, js, cfg.Replicas, cfg.MaxBytes); err != nil {
				return fmt.Errorf("make stream %s: %w", b.stream, err)
			}
			current.add(b)
		}
	}
	return nil
}
