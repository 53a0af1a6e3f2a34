package pack

import (
	"sync"

	"github.com/jetfarm/jetfarm/cas/keymap"
)

// table tells where each blob is.
type table struct {
	parts [tableParts]struct {
		mu     sync.RWMutex
		places keymap.Map // guarded by mu
	}
}

const tableParts = 64

func (t *table) part(k keymap.Key) (*sync.RWMutex, *keymap.Map) {
	p := &t.parts[k[len(k)-1]%tableParts]
	return &p.mu, &p.places
}

// get returns the place of a blob, 0 when there is none.
func (t *table) get(k keymap.Key) place {
	mu, places := t.part(k)
	mu.RLock()
	defer mu.RUnlock()
	return place(places.Get(k))
}

func (t *table) set(k keymap.Key, p place) {
	mu, places := t.part(k)
	mu.Lock()
	defer mu.Unlock()
	places.Set(k, uint64(p))
}

// remove forgets a blob that is still at this place.
func (t *table) remove(k keymap.Key, p place) {
	mu, places := t.part(k)
	mu.Lock()
	defer mu.Unlock()
	if place(places.Get(k)) == p {
		places.Set(k, 0)
	}
}

// removeAll forgets what is in a segment.
func (t *table) removeAll(number uint64) {
	for i := range t.parts {
		p := &t.parts[i]
		p.mu.Lock()
		p.places.Update(func(_ keymap.Key, v uint64) uint64 {
			if place(v).number() == number&numberMask {
				return 0
			}
			return v
		})
		p.mu.Unlock()
	}
}

// all calls f with every blob in a segment.
func (t *table) all(number uint64, f func(keymap.Key, place)) {
	for i := range t.parts {
		p := &t.parts[i]
		p.mu.RLock()
		p.places.All(func(k keymap.Key, v uint64) {
			if place(v).number() == number&numberMask {
				f(k, place(v))
			}
		})
		p.mu.RUnlock()
	}
}

func (t *table) len() (n int64) {
	for i := range t.parts {
		p := &t.parts[i]
		p.mu.RLock()
		n += int64(p.places.Len())
		p.mu.RUnlock()
	}
	return n
}
