package objectstore

import "context"

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
	return encodeObject(newBucket(large, 1, 0, 1), d, tail(d)+".upload", positions)
}
