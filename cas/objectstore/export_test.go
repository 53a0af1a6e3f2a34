package objectstore

import (
	"context"
	"time"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Refresh lists the streams as Run does after a gap.
func (s *Store) Refresh(ctx context.Context) error { return s.refresh(ctx) }

// Sweep is a listing that finds nothing and takes as long as f.
func (s *Store) Sweep(f func()) {
	s.index.begin(s.generations())
	f()
	s.index.sweep(s.current().number)
}

// What follows is for the fuzz tests of the parsers.

// ParseChunkSubject reads the part of a chunk subject after `C.` and returns it as it is written.
func ParseChunkSubject(s string) (again string, ok bool) {
	d, ok := parseChunk(s)
	if !ok {
		return "", false
	}
	return tail(d), true
}

// ParseMetaSubject reads the part of a metadata subject after `M.` and returns it as it is written.
func ParseMetaSubject(s string) (again string, ok bool) {
	d, ok := parseMeta(s)
	if !ok {
		return "", false
	}
	return (&bucket{}).meta(d), true
}

// ParseStream reads a stream name and returns it as it is written.
func ParseStream(s string) (again string, ok bool) {
	f, generation, shard, ok := parseStream(s)
	if !ok {
		return "", false
	}
	return newBucket(f, generation, shard, 1).stream, true
}

// DecodeNews reads an announcement and returns it as it is written.
func DecodeNews(data []byte) (again []byte, ok bool) {
	sender, records, ok := decodeNews(data)
	if !ok {
		return nil, false
	}
	return encodeNews(sender, records), true
}

// DecodeObject reads the positions of the chunks of a blob of this size in its metadata.
func DecodeObject(hash string, size int64, data []byte) ([]uint64, error) {
	d, ok := parseChunk(hash[:2] + ".sha256." + hash + "-" + "1")
	if !ok {
		panic("bad hash")
	}
	d, err := d.Space().New(hash, size)
	if err != nil {
		return nil, err
	}
	o, err := decodeObject(newBucket(large, 1, 0, 1), d, stored{data: data})
	return o.positions, err
}

// EncodeObject is the metadata that DecodeObject reads.
func EncodeObject(hash string, size int64, positions []uint64) ([]byte, error) {
	d, _ := parseChunk(hash[:2] + ".sha256." + hash + "-" + "1")
	d, err := d.Space().New(hash, size)
	if err != nil {
		return nil, err
	}
	return encodeObject(newBucket(large, 1, 0, 1), d, tail(d)+".upload", form{size: size, sha256: hashBytes(d)}, positions)
}

// What follows lets tests of the rotation look at and stop single steps.

// GenerationOf is where the index has a blob, 0 for nowhere.
func (s *Store) GenerationOf(d digest.Digest) uint32 {
	e, _ := s.index.get(keyOf(d), d.Size())
	return e.generation()
}

// Old is up to which generation blobs are old.
func (s *Store) Old() uint32 { return s.known().Old }

// Rotates tells whether this Store is the rotator.
func (s *Store) Rotates(ctx context.Context) bool {
	v, err := s.ask(ctx)
	return err == nil && v.Holder == s.name
}

// StateOf is the state as this Store knows it.
func (s *Store) StateOf() any { return s.known() }

// Turn is one turn of a rotator.
func (s *Store) Turn(ctx context.Context) error {
	r := rotator{store: s, marked: make(map[uint32]time.Time)}
	_, err := r.turn(ctx, false)
	return err
}

// DropAll writes the decision to drop all generations but the current one, made by a state.
func (s *Store) DropAll(ctx context.Context, by any) error {
	v := by.(*view)
	next := v.state
	next.Old, next.Dropped = next.Current, next.Current
	_, err := s.write(ctx, v, next)
	return err
}

// WriteDrop writes the decision to drop the generations up to one, and does no more.
func (s *Store) WriteDrop(ctx context.Context, generation uint32) error {
	v, err := s.ask(ctx)
	if err != nil || v.Dropped >= generation {
		return err
	}
	next := v.state
	next.Aging, next.Old, next.Dropped = max(next.Aging, generation), max(next.Old, generation), generation
	_, err = s.write(ctx, v, next)
	return err
}

// DeleteDropped deletes the streams of all generations that a state has dropped.
func (s *Store) DeleteDropped(ctx context.Context, by any) error {
	r := rotator{store: s}
	_, dead, err := r.measure(ctx, by.(*view).Dropped)
	if err != nil {
		return err
	}
	for g := uint32(1); g <= by.(*view).Dropped; g++ {
		dead = append(dead, extent{number: g, streams: []string{newBucket(small, g, 0, 1).stream, newBucket(large, g, 0, 1).stream}})
	}
	return r.delete(ctx, dead)
}

// Make makes the streams of a generation.
func (s *Store) Make(ctx context.Context, number uint32) error { return s.make(ctx, number) }

// Clean removes what uploads left behind.
func (s *Store) Clean(ctx context.Context) error { return s.sweepAll(ctx) }
