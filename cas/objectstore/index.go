package objectstore

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/keymap"
)

type (
	key   = keymap.Key
	keyer = keymap.Keyer
)

// keyOf is the key of a single digest.
func keyOf(d digest.Digest) key { return keymap.Of(d) }

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
	entries keymap.Map // to entry; guarded by mu
	_       [cacheLine]byte
}

// cacheLine keeps the locks of shards from sharing one.
const cacheLine = 64

func newIndex() *index { return new(index) }

// shard uses a byte that a listing by hash prefix varies.
func (x *index) shard(k key) *indexShard { return &x.shards[k[len(k)-1]%indexShards] }

// get returns the entry of a key, and whether it is that of a blob of this size.
func (x *index) get(k key, size int64) (entry, bool) {
	s := x.shard(k)
	s.mu.RLock()
	e := entry(s.entries.Get(k))
	s.mu.RUnlock()
	if e.generation() <= x.dropped.Load() {
		return 0, false
	}
	return e, e.size() == size
}

// getAll fills entries with those of many keys, 0 where there is none. It locks everything for all of
// them, since a lock for each would have every lookup wait for the memory that the one before it reads.
func (x *index) getAll(keys []key, entries []entry) {
	const atOnce = 1000 // bounds how long writers wait
	for at := 0; at < len(keys); at += atOnce {
		end := min(at+atOnce, len(keys))
		x.fill(keys[at:end], entries[at:end])
	}
}

func (x *index) fill(keys []key, entries []entry) {
	for i := range x.shards {
		x.shards[i].mu.RLock()
	}
	for i, k := range keys {
		entries[i] = entry(x.shard(k).entries.Get(k))
	}
	for i := range x.shards {
		x.shards[i].mu.RUnlock()
	}
	dropped := x.dropped.Load()
	for i, e := range entries {
		if e.generation() <= dropped {
			entries[i] = 0
		}
	}
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
	x.update(func(e entry) entry {
		if e.generation() <= dropped {
			return 0
		}
		return e
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
	old := entry(s.entries.Get(k))
	if old.generation() < e.generation() || (old.generation() == e.generation() && old&mark == 0) {
		s.entries.Set(k, uint64(e|mark))
	}
}

// begin removes the marks, and the entries of all generations but these.
func (x *index) begin(live []*generation) {
	x.update(func(e entry) entry {
		if !slices.ContainsFunc(live, func(g *generation) bool { return g.number == e.generation() }) {
			return 0
		}
		return e &^ mark
	})
}

// sweep drops what is not marked of a generation and returns how many entries that are.
func (x *index) sweep(generation uint32) (dropped int) {
	x.update(func(e entry) entry {
		if e.generation() == generation && e&mark == 0 {
			dropped++
			return 0
		}
		return e
	})
	return dropped
}

// update replaces every entry by what f returns for it, 0 to remove it. It locks one shard at a time.
func (x *index) update(f func(e entry) entry) {
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.Lock()
		s.entries.Update(func(_ key, e uint64) uint64 { return uint64(f(entry(e))) })
		s.mu.Unlock()
	}
}

// each calls f with every entry. It locks one shard at a time.
func (x *index) each(f func(e entry)) {
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.RLock()
		s.entries.All(func(_ key, e uint64) { f(entry(e)) })
		s.mu.RUnlock()
	}
}

// forget removes the blob if it is known from this generation or an older one.
func (x *index) forget(k key, generation uint32) {
	s := x.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if entry(s.entries.Get(k)).generation() <= generation {
		s.entries.Set(k, 0)
	}
}

// len counts the entries.
func (x *index) len() int {
	n := 0
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.RLock()
		n += s.entries.Len()
		s.mu.RUnlock()
	}
	return n
}
