package objectstore

import (
	"fmt"
	"slices"
	"time"
)

// plan is a rotator's decision while it is made.
type plan struct {
	*rotator
	now  state    // before
	next state    // after
	live []extent // the live generations, oldest first, and not none

	reserved int64 // what was stored since they were measured, and what uploads may still store
	wanted   int64 // what somebody waits for
	slice    int64 // bytes of one generation
	count    int64 // blobs of one generation
	refused  string
	collect  bool // what is old is dropped without need
	held     bool // something has to stay because its time is not over
}

// plan returns the state that follows from one look at the live generations, oldest first, and not
// none; before is what ledger.begin said when they were measured.
func (r *rotator) plan(now state, live []extent, before int64, collect bool) state {
	s := r.store
	p := plan{rotator: r, now: now, next: now, live: live, refused: s.refused(time.Now()), collect: collect}
	p.next.Used, _ = sum(live)
	var full string
	p.next.Limit, full = r.limit()
	p.next.Limit = r.learn(p.next.Limit, p.next.Used, p.refused != "")
	p.reserved, p.wanted = s.ledger.needs(before)
	p.slice, p.count = p.next.Limit/slicing, min(maxCount, max(1, s.cfg.MaxBlobs/slicing))
	p.rotate()
	p.next.Aging, p.next.Old = r.marks(p.next, p.live)
	p.drop()
	if full == "" {
		full = p.full()
	}
	p.next.Full = full
	return p.next
}

func sum(of []extent) (bytes, blobs int64) {
	for _, e := range of {
		bytes += e.bytes
		blobs += e.blobs
	}
	return bytes, blobs
}

// rotate adds the next generation when the current one is large enough, or old enough, or in the way.
func (p *plan) rotate() {
	current, limit := p.live[len(p.live)-1], p.next.Limit
	p.next.Current = max(p.now.Current, current.number)
	alone := len(p.live) == 1 && limit > 0 && p.next.Used+p.reserved+p.wanted > limit
	due := (limit > 0 && current.bytes >= p.slice) || current.blobs >= p.count || time.Since(current.created) >= p.store.cfg.MaxAge
	if current.blobs > 0 && current.number == p.next.Current && (due || p.collect || alone) {
		p.next.Current++
		p.live = append(slices.Clip(p.live), extent{number: p.next.Current})
	}
}

// drop drops the oldest generations while there is less room than one generation takes or somebody
// waits for. A generation is announced to be old first, and dropped once everybody knows and its time
// is over.
func (p *plan) drop() {
	used, blobs := sum(p.live)
	free, old := max(p.slice, p.wanted), p.next.Old
	blocked := false
	for i, e := range p.live[:len(p.live)-1] {
		over := p.next.Limit > 0 && used+p.reserved+free > p.next.Limit
		many := blobs+p.count > p.store.cfg.MaxBlobs && e.number <= old
		if !over && !many && (p.refused == "" || i > 0) && (!p.collect || e.number > p.now.Old) {
			return
		}
		switch wait := p.wait(e.number); {
		case e.number > p.now.Old:
			p.next.Old = max(p.next.Old, e.number)
			p.next.Aging = max(p.next.Aging, e.number)
			blocked = true
		case wait > 0:
			p.held = p.held || wait > viewGrace
			blocked = true
		case !blocked:
			p.next.Dropped = e.number
		}
		used -= e.bytes
		blobs -= e.blobs
	}
}

// full says why nothing can be stored, or "".
func (p *plan) full() string {
	// What was stored while the streams were measured is counted twice, so one look is not enough.
	left := p.next.Limit - p.next.Used - p.reserved
	before := p.pressed
	p.pressed = p.held && left < max(p.wanted, p.slice/2)
	switch {
	case p.pressed && before:
		return fmt.Sprintf("what was reported present within the last %v fills %s; a larger --cas-size or a shorter --cas-retention helps",
			p.store.cfg.Retention, bytesOf(p.next.Limit))
	case p.refused != "" && len(p.live) == 1:
		return "the broker refuses to store: " + p.refused
	}
	return ""
}

// marks returns up to which generations are aging and old, by what is newer than they are.
func (r *rotator) marks(now state, live []extent) (aging, old uint32) {
	aging, old = now.Aging, now.Old
	newer, blobs := int64(0), int64(0)
	for i, e := range slices.Backward(live) {
		past := func(percent int64) bool {
			return (now.Limit > 0 && newer >= now.Limit/100*percent) || blobs >= r.store.cfg.MaxBlobs*percent/100
		}
		if i < len(live)-1 && past(agingPercent) {
			aging = max(aging, e.number)
		}
		if i < len(live)-1 && past(oldPercent) {
			old = max(old, e.number)
		}
		newer += e.bytes
		blobs += e.blobs
	}
	return aging, old
}

// wait is how long an old generation has to stay yet.
func (r *rotator) wait(generation uint32) time.Duration {
	marked, ok := r.marked[generation]
	if !ok {
		return viewGrace + r.store.cfg.Retention
	}
	return viewGrace + r.store.cfg.Retention - time.Since(marked)
}

// learn lowers the limit to what a broker had room for that refused to store more and has not told its
// own limit.
func (r *rotator) learn(limit, used int64, refused bool) int64 {
	switch {
	case refused && used > 0:
		r.learned, r.learnedAt = used-used/maxMargin-1, time.Now()
	case time.Since(r.learnedAt) > learnedBound:
		r.learned = 0
	}
	if r.learned > 0 && (limit == 0 || r.learned < limit) {
		return r.learned
	}
	return limit
}

// learnedBound is after which time it is tried again whether the broker has room for more.
const learnedBound = 10 * time.Minute

// limit is the most bytes that the streams may hold now, 0 for no bound, and why nothing may be stored
// if that is so.
func (r *rotator) limit() (limit int64, full string) {
	s := r.store
	now := time.Now()
	limit = s.cfg.MaxSize
	disks := s.disks.all(now)
	for _, d := range disks {
		if share := Share(d.Max); s.cfg.MaxSize == 0 && d.Max > 0 && (limit == 0 || share < limit) {
			limit = share
		}
	}
	low := false
	for _, d := range disks {
		room := d.Free - d.high()
		if d.Max > 0 {
			room = min(room, d.Max-d.Used-d.Max/maxMargin)
		}
		if byDisk := max(1, d.stored+room); limit == 0 || byDisk < limit {
			limit = byDisk
		}
		if d.Free < d.low() || (r.low && d.Free < d.high()) {
			low = true
			full = fmt.Sprintf("the disk of broker %s has %s free; blobs are stored again when it has %s", d.Server, bytesOf(d.Free), bytesOf(d.high()))
		}
	}
	r.low = low
	return limit, full
}
