package actioncache

import (
	"time"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Live tells whether the memory is kept current.
func (c *Cache) Live() bool {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	return c.memory.live
}

// Hits counts what was found in memory.
func (c *Cache) Hits() uint64 {
	_, hits := c.memory.usage()
	return hits
}

// Used is how many bytes are in memory.
func (c *Cache) Used() int64 {
	bytes, _ := c.memory.usage()
	return bytes
}

// Memory is a memory by itself, whose values are strings.
type Memory struct{ *memory }

// NewMemory returns one that lives.
func NewMemory(limit int64, age time.Duration) Memory {
	m := Memory{newMemory(limit, age)}
	m.empty(true)
	return m
}

// Get returns the value, or "", and the epoch.
func (m Memory) Get(action digest.Digest) (string, uint64) {
	k, epoch := m.get(action, time.Now())
	if k == nil {
		return "", epoch
	}
	return string(k.result), epoch
}

// Add keeps a value.
func (m Memory) Add(action digest.Digest, sequence uint64, value string, epoch uint64, asked time.Time) {
	data := append([]byte{formInline}, value...)
	m.add(action, sequence, &known{entry: entry{value: data, sequence: sequence}, result: data[1:]}, epoch, asked)
}

// Changed keeps that there is a newer value.
func (m Memory) Changed(action digest.Digest, sequence uint64) { m.changed(action, sequence) }

// Doubt forgets the value.
func (m Memory) Doubt(action digest.Digest) { m.doubt(action) }

// Gap empties it.
func (m Memory) Gap() { m.empty(true) }

// Used is how many bytes are kept.
func (m Memory) Used() int64 {
	bytes, _ := m.usage()
	return bytes
}
