package inputs

import (
	"sync"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// cache keeps parsed directories up to a number of bytes, least recently used first out.
type cache struct {
	max int64

	mu      sync.Mutex // guards the rest
	used    int64
	ring    cached // its next is the most recently used, its previous the least
	entries map[digest.Digest]*cached
}

// cached is an element of a ring.
type cached struct {
	digest         digest.Digest
	dir            *directory
	next, previous *cached
}

func newCache(maxBytes int64) *cache {
	c := &cache{max: maxBytes, entries: map[digest.Digest]*cached{}}
	c.ring.next, c.ring.previous = &c.ring, &c.ring
	return c
}

func (c *cache) get(d digest.Digest) (*directory, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[d]
	if !ok {
		return nil, false
	}
	e.unlink()
	c.push(e)
	return e.dir, true
}

func (c *cache) put(d digest.Digest, dir *directory) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.entries[d]; ok || dir.cost > c.max {
		return
	}
	e := &cached{digest: d, dir: dir}
	c.entries[d] = e
	c.push(e)
	for c.used += dir.cost; c.used > c.max; {
		old := c.ring.previous
		old.unlink()
		delete(c.entries, old.digest)
		c.used -= old.dir.cost
	}
}

// push makes e the most recently used; c.mu must be held.
func (c *cache) push(e *cached) {
	e.next, e.previous = c.ring.next, &c.ring
	e.next.previous, e.previous.next = e, e
}

func (e *cached) unlink() { e.next.previous, e.previous.next = e.previous, e.next }
