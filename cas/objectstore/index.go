package objectstore

import (
	"crypto/sha256"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// key names a blob in the index: the first half of its hash, and outside the default key space
// mixed with the hash of the space's token. Two blobs of one key would have to agree in 128 bits
// of their hashes.
type key [16]byte

// keyer makes keys. It remembers the last space, since the digests of one request mostly share it.
type keyer struct {
	space digest.Space
	mix   key
}

func (k *keyer) of(d digest.Digest) key {
	if space := d.Space(); space != k.space {
		k.space, k.mix = space, key{}
		if space.Instance() != "" || space.Function() != digest.SHA256 {
			sum := sha256.Sum256([]byte(space.Token()))
			k.mix = key(sum[:len(k.mix)])
		}
	}
	hash, out := d.Hash(), k.mix
	for i := range out {
		out[i] ^= nibble(hash[2*i])<<4 | nibble(hash[2*i+1])
	}
	return out
}

// keyOf is the key of a single digest.
func keyOf(d digest.Digest) key {
	var k keyer
	return k.of(d)
}

// entry is what the index knows of a blob, packed: 20 bits of generation, one that tells a large
// blob and 43 of size. No entry has size 0, since the empty blob is never stored. The first bit of
// the size is 0 in announcements, since no blob is that large, and is the mark in the index.
type entry uint64

const (
	sizeBits      = 43
	mark          = 1 << (sizeBits - 1)
	sizeMask      = mark - 1
	maxGeneration = 1<<20 - 1
)

func newEntry(b *bucket, size int64) entry {
	e := entry(b.generation)<<(sizeBits+1) | entry(size) //nolint:gosec // not negative
	if b.family == large {
		e |= 1 << sizeBits
	}
	return e
}

// lostEntry announces that a generation does not have a blob.
func lostEntry(generation uint32) entry { return entry(generation) << (sizeBits + 1) }

func (e entry) generation() uint32 { return uint32(e >> (sizeBits + 1)) }
func (e entry) size() int64        { return int64(e & sizeMask) }

// indexShards spreads the index over locks.
const indexShards = 64

// index tells which blobs exist and in which generation. It may lack some, and it has only what was
// stored or announced once.
//
// A listing of the streams forgets what they have lost: begin removes the mark of every entry, what
// is set from then on is marked, be it new or not, and sweep drops what is not marked. So an entry
// that was not listed stays if it was set while the listing ran. The rejected alternative is a second
// index that a listing fills, which takes twice the memory and has to hear of everything as well.
type index struct {
	shards  [indexShards]indexShard
	dropped atomic.Uint32 // entries up to this generation count as absent
}

type indexShard struct {
	mu      sync.RWMutex
	entries map[key]entry // guarded by mu
}

func newIndex() *index {
	x := new(index)
	for i := range x.shards {
		x.shards[i].entries = make(map[key]entry)
	}
	return x
}

// shard uses a byte that a listing by hash prefix varies.
func (x *index) shard(k key) *indexShard { return &x.shards[k[len(k)-1]%indexShards] }

// get returns the entry of a key, and whether it is that of a blob of this size.
func (x *index) get(k key, size int64) (entry, bool) {
	s := x.shard(k)
	s.mu.RLock()
	e, ok := s.entries[k]
	s.mu.RUnlock()
	if ok && e.generation() <= x.dropped.Load() {
		return 0, false
	}
	return e, ok && e.size() == size
}

// drop makes the entries up to a generation absent. They stay until prune.
func (x *index) drop(generation uint32) {
	for old := x.dropped.Load(); old < generation; old = x.dropped.Load() {
		if x.dropped.CompareAndSwap(old, generation) {
			return
		}
	}
}

// prune removes the entries that drop made absent.
func (x *index) prune() {
	dropped := x.dropped.Load()
	x.each(func(entries map[key]entry, k key, e entry) {
		if e.generation() <= dropped {
			delete(entries, k)
		}
	})
}

// set adds an entry, or marks the one that is there, unless a newer generation has the blob.
func (x *index) set(k key, e entry) {
	if e.generation() <= x.dropped.Load() {
		return
	}
	s := x.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.entries[k]
	if !ok || old.generation() < e.generation() || (old.generation() == e.generation() && old&mark == 0) {
		s.entries[k] = e | mark
	}
}

// begin removes the marks, and the entries of all generations but these.
func (x *index) begin(live []*generation) {
	x.each(func(entries map[key]entry, k key, e entry) {
		switch {
		case !slices.ContainsFunc(live, func(g *generation) bool { return g.number == e.generation() }):
			delete(entries, k)
		case e&mark != 0:
			entries[k] = e &^ mark
		}
	})
}

// sweep drops what is not marked of a generation and returns how many entries that are.
func (x *index) sweep(generation uint32) (dropped int) {
	x.each(func(entries map[key]entry, k key, e entry) {
		if e.generation() == generation && e&mark == 0 {
			delete(entries, k)
			dropped++
		}
	})
	return dropped
}

// each calls f with every entry, which f may change or delete. It locks one shard at a time.
func (x *index) each(f func(entries map[key]entry, k key, e entry)) {
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.Lock()
		for k, e := range s.entries {
			f(s.entries, k, e)
		}
		s.mu.Unlock()
	}
}

// forget removes the blob if it is known from this generation or an older one.
func (x *index) forget(k key, generation uint32) {
	s := x.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.entries[k]; ok && e.generation() <= generation {
		delete(s.entries, k)
	}
}

// len counts the entries.
func (x *index) len() int {
	n := 0
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.RLock()
		n += len(s.entries)
		s.mu.RUnlock()
	}
	return n
}
