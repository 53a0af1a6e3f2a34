package pack

import (
	"context"
	"errors"
	"time"
)

// tendEvery is how often the room on the disk is looked at: a broker may fill GiB in seconds.
const tendEvery = time.Second

// Run makes room for what is added until ctx ends, and then returns nil.
func (p *Pack) Run(ctx context.Context) error {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		p.tend(ctx)
		select {
		case <-p.wake:
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// tend writes the tables of full segments, deletes the oldest segments as long as there is too much, and
// makes the next one.
func (p *Pack) tend(ctx context.Context) {
	err := errors.Join(p.takeFailure(), p.writeTables(false))
	crowded := p.crowded()
	for {
		s := p.shrink(crowded)
		if s == nil {
			break
		}
		err = errors.Join(err, p.delete(s))
		crowded = p.crowded()
	}
	if !crowded {
		err = errors.Join(err, p.makeSpare())
	}
	if err != nil {
		p.cfg.Log.WarnContext(ctx, "small blobs are not kept on disk for now", "dir", p.cfg.Dir, "err", err)
	}
}

// takeFailure returns the error of a write since the last call.
func (p *Pack) takeFailure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.failure
	p.failure = nil
	return err
}

// The disk is crowded when less than a sixteenth of it is free, or less than mostFree. The farm evicts
// blobs only when a twentieth is, and at most 4 GiB (objectstore.TellDisk).
const (
	freePart = 16
	mostFree = 5 << 30
)

func (p *Pack) crowded() bool {
	total, free, err := p.cfg.Room()
	return err == nil && free < min(total/freePart, mostFree)
}

// reserved is what a segment that is written to may come to take.
func (p *Pack) reserved() int64 { return p.segment + tableSize(p.segment/perBlob) }

// shrink takes the oldest segment from the list if there is too much: all but what is kept and the next
// segment must fit. On a crowded disk everything is too much. It returns nil when nothing is.
func (p *Pack) shrink(crowded bool) *segment {
	p.mu.Lock()
	defer p.mu.Unlock()
	if crowded && len(p.segments) == 0 && p.spare != nil {
		s := p.spare
		p.spare = nil
		return s
	}
	if len(p.segments) == 0 {
		return nil
	}
	used := p.reserved() // of the spare one
	for i, s := range p.segments {
		if i == len(p.segments)-1 && !s.full {
			used += p.reserved()
		} else {
			used += s.cost()
		}
	}
	if !crowded && used <= p.cfg.MaxBytes && len(p.segments) < maxSegments {
		return nil
	}
	s := p.segments[0]
	p.segments = p.segments[1:]
	s.dropped = true
	p.metrics.dropped.Inc()
	return s
}

// makeSpare makes the next segment unless there is one.
func (p *Pack) makeSpare() error {
	p.mu.Lock()
	needed := p.spare == nil && time.Now().After(p.pause)
	if needed {
		p.last++
	}
	number := p.last
	p.mu.Unlock()
	if !needed {
		return nil
	}
	s, err := p.create(number)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spare = s
	return nil
}

// writeTables writes the tables of the full segments that have none, or of all.
func (p *Pack) writeTables(all bool) error {
	p.mu.Lock()
	var due []*segment
	for i, s := range p.segments {
		if i < len(p.segments)-1 || all {
			s.full = true
		}
		if s.full && !s.table {
			due = append(due, s)
		}
	}
	p.mu.Unlock()
	for _, s := range due {
		if err := p.writeTable(s); err != nil {
			return err
		}
		p.mu.Lock()
		s.table = true
		p.mu.Unlock()
	}
	return nil
}

// bytes is what the files take, or may come to take.
func (p *Pack) bytes() (n int64) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for _, s := range p.segments {
		n += s.bytes()
	}
	return n
}
