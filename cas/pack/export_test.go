package pack

import (
	"context"
	"time"
)

// Tend does what Run does from time to time.
func (p *Pack) Tend(ctx context.Context) { p.tend(ctx) }

// Resume ends the pause after a write that failed.
func (p *Pack) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pause = time.Time{}
}

// RecordSize is how much of a segment a blob takes.
var RecordSize = recordSize
