package disk

import (
	"github.com/jetfarm/jetfarm/cas/digest"
)

// key is what a file is looked up by. It has no pointer, so a million of them cost the garbage
// collector nothing.
type key struct {
	// hash is that of the blob in 256 bits: a longer one is cut, since half of a SHA-512 says as much as
	// a SHA-256, and a shorter one has zeros at its end.
	hash       [32]byte
	space      uint32 // of index.spaces
	executable bool
}

// blob is the key of the blob's plain variant, under which fetches are shared.
func (k key) blob() key { return key{hash: k.hash, space: k.space} }

// entry is one file.
type entry struct {
	key        key
	size       int64
	generation uint64
	sum        uint32 // the CRC-32C of the content, if summed
	summed     bool
}

// cost is the space that a blob takes on the disk.
func cost(size int64) int64 {
	const block = 4096
	return (size + block - 1) / block * block
}

// index knows the files and the order of their last uses. It does no I/O and locks nothing.
type index struct {
	byKey map[key]int32
	slots []slot // slots[0] is the ring's anchor: its next is the newest, its previous the oldest
	free  []int32
	used  int64 // the sum of the costs

	spaces  []string // names by id
	spaceID map[string]uint32
	known   map[digest.Space]uint32 // a cache of spaceID
}

type slot struct {
	entry
	prev, next int32
}

func newIndex() *index {
	return &index{
		byKey:   make(map[key]int32),
		slots:   make([]slot, 1),
		spaceID: make(map[string]uint32),
		known:   make(map[digest.Space]uint32),
	}
}

// space returns the id of a key space, made when it is new. Ids live as long as the process; the
// front ends decide how many instances there are.
func (x *index) space(s digest.Space) uint32 {
	if id, ok := x.known[s]; ok {
		return id
	}
	id := x.spaceByName(spaceName(s))
	x.known[s] = id
	return id
}

func (x *index) spaceByName(name string) uint32 {
	id, ok := x.spaceID[name]
	if !ok {
		id = uint32(len(x.spaces)) //nolint:gosec // 4 billion names do not fit into memory.
		x.spaces = append(x.spaces, name)
		x.spaceID[name] = id
	}
	return id
}

// get returns the entry without using it.
func (x *index) get(k key) (entry, bool) {
	i, ok := x.byKey[k]
	return x.slots[i].entry, ok
}

// use returns the entry and makes it the newest.
func (x *index) use(k key) (entry, bool) {
	i, ok := x.byKey[k]
	if !ok {
		return entry{}, false
	}
	x.unlink(i)
	x.push(i)
	return x.slots[i].entry, true
}

// insert makes e the newest entry and returns the one with the same key that it replaces.
func (x *index) insert(e entry) (old entry, replaced bool) {
	i, replaced := x.byKey[e.key]
	if replaced {
		old = x.slots[i].entry
		x.unlink(i)
		x.used -= cost(old.size)
	} else {
		i = x.slot()
		x.byKey[e.key] = i
	}
	x.slots[i].entry = e
	x.push(i)
	x.used += cost(e.size)
	return old, replaced
}

// remove forgets the entry if its generation is still the one of e.
func (x *index) remove(e entry) bool {
	i, ok := x.byKey[e.key]
	if !ok || x.slots[i].generation != e.generation {
		return false
	}
	x.unlink(i)
	x.used -= cost(x.slots[i].size)
	x.slots[i] = slot{}
	x.free = append(x.free, i)
	delete(x.byKey, e.key)
	return true
}

// oldest returns the entry that was not used for the longest time.
func (x *index) oldest() (entry, bool) {
	i := x.slots[0].prev
	return x.slots[i].entry, i != 0
}

func (x *index) len() int { return len(x.byKey) }

func (x *index) slot() int32 {
	if n := len(x.free); n > 0 {
		i := x.free[n-1]
		x.free = x.free[:n-1]
		return i
	}
	x.slots = append(x.slots, slot{})
	return int32(len(x.slots) - 1) //nolint:gosec // 2 billion slots do not fit into memory.
}

func (x *index) unlink(i int32) {
	s := x.slots[i]
	x.slots[s.prev].next, x.slots[s.next].prev = s.next, s.prev
}

func (x *index) push(i int32) {
	first := x.slots[0].next
	x.slots[i].prev, x.slots[i].next = 0, first
	x.slots[first].prev, x.slots[0].next = i, i
}
