package keymap

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
)

// Map maps keys to numbers that are not 0. The zero value is empty.
//
// It probes linearly from the slot that a key's hash says. Which one that is depends on random numbers,
// so that a client that picks what it stores cannot make lookups long.
type Map struct {
	slots []slot
	used  int
	seeds [2]uint64
}

// slot is free when its value is 0.
type slot struct {
	key   Key
	value uint64
}

// A table grows by a quarter when 80 of 100 slots are taken, so an entry takes 30 to 37 bytes.
const (
	fullest     = 80
	growPercent = 125
	smallest    = 8
)

// Len is the number of entries.
func (m *Map) Len() int { return m.used }

// home is where the probing for a key begins.
func (m *Map) home(k *Key) int {
	high, low := bits.Mul64(binary.LittleEndian.Uint64(k[:8])^m.seeds[0], binary.LittleEndian.Uint64(k[8:])^m.seeds[1])
	at, _ := bits.Mul64((high^low)*0x9e3779b97f4a7c15, uint64(len(m.slots)))
	return int(at) //nolint:gosec // below the number of slots
}

// find returns the slot of a key, or the free one where it would be. There are slots.
func (m *Map) find(k *Key) *slot {
	for i := m.home(k); ; {
		s := &m.slots[i]
		if s.value == 0 || s.key == *k {
			return s
		}
		if i++; i == len(m.slots) {
			i = 0
		}
	}
}

// Get returns the value of a key, 0 when there is none.
func (m *Map) Get(k Key) uint64 {
	if m.used == 0 {
		return 0
	}
	return m.find(&k).value
}

// Set sets the value of a key. 0 removes it.
func (m *Map) Set(k Key, value uint64) {
	if value == 0 {
		m.remove(&k)
		return
	}
	if (m.used+1)*100 > len(m.slots)*fullest {
		m.rebuild(max(smallest, (m.used+1)*100*growPercent/fullest/100))
	}
	s := m.find(&k)
	if s.value == 0 {
		m.used++
	}
	*s = slot{k, value}
}

// rebuild moves the entries to a table of so many slots.
func (m *Map) rebuild(slots int) {
	old := m.slots
	m.slots = make([]slot, slots)
	if m.seeds == [2]uint64{} {
		m.seeds = [2]uint64{rand.Uint64(), rand.Uint64()} //nolint:gosec // it need not withstand those who see memory
	}
	for i := range old {
		if old[i].value != 0 {
			*m.find(&old[i].key) = old[i]
		}
	}
}

// remove frees the slot of a key and moves those into the gap that would not be found across it.
func (m *Map) remove(k *Key) {
	if m.used == 0 {
		return
	}
	s := m.find(k)
	if s.value == 0 {
		return
	}
	m.used--
	gap := m.home(k)
	for &m.slots[gap] != s {
		gap = m.next(gap)
	}
	for i := m.next(gap); m.slots[i].value != 0; i = m.next(i) {
		// An entry stays when its home lies behind the gap, on the way from there to it.
		if m.distance(gap, m.home(&m.slots[i].key)) <= m.distance(gap, i) && m.home(&m.slots[i].key) != gap {
			continue
		}
		m.slots[gap] = m.slots[i]
		gap = i
	}
	m.slots[gap] = slot{}
}

func (m *Map) next(i int) int {
	if i++; i == len(m.slots) {
		return 0
	}
	return i
}

// distance is how many steps it takes from one slot to another.
func (m *Map) distance(from, to int) int {
	if to < from {
		to += len(m.slots)
	}
	return to - from
}

// Update replaces every value by what f returns for it, 0 to remove the entry.
func (m *Map) Update(f func(k Key, value uint64) uint64) {
	before := m.used
	for i := range m.slots {
		s := &m.slots[i]
		if s.value == 0 {
			continue
		}
		if s.value = f(s.key, s.value); s.value == 0 {
			m.used--
		}
	}
	if m.used < before {
		m.rebuild(max(smallest, m.used*100*growPercent/fullest/100))
	}
}

// All calls f with every entry.
func (m *Map) All(f func(k Key, value uint64)) {
	for i := range m.slots {
		if s := &m.slots[i]; s.value != 0 {
			f(s.key, s.value)
		}
	}
}
