package objectstore

import (
	"sync"
	"time"
)

const (
	// lostWindow is how long a digest that nobody has is not announced again.
	lostWindow = time.Second
	// lostRecords bounds the digests announced in one window, so that whoever asks for random ones
	// does not crowd out what was stored.
	lostRecords = 4096
)

// losses remembers which digests were announced as lost a short time ago. The zero value is ready.
type losses struct {
	mu        sync.Mutex
	began     time.Time        // guarded by mu
	announced map[key]struct{} // guarded by mu; since began
}

// due tells whether to announce the key at this time, and counts it if so.
func (l *losses) due(k key, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.announced == nil || now.Sub(l.began) >= lostWindow {
		l.began, l.announced = now, make(map[key]struct{})
	}
	if _, again := l.announced[k]; again || len(l.announced) >= lostRecords {
		return false
	}
	l.announced[k] = struct{}{}
	return true
}
