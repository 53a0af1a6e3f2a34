package objectstore

import (
	"fmt"
	"time"
)

// plan returns the state that follows from one look at the streams. The extents are those of the live
// generations, oldest first, and not none; before is what ledger.begin said when they were measured.
func (r *rotator) plan(now state, live []extent, before int64, collect bool) state {
	s := r.store
	next := now
	next.Used = 0
	blobs := int64(0)
	for _, e := range live {
		next.Used += e.bytes
		blobs += e.blobs
	}
	limit, full := r.limit(next.Used)
	next.Limit = limit
	reserved, wanted := s.ledger.needs(before)
	slice, count := limit/slicing, min(maxCount, max(1, s.cfg.MaxBlobs/slicing))

	current := live[len(live)-1]
	next.Current = max(now.Current, current.number)
	alone := len(live) == 1 && limit > 0 && next.Used+reserved+wanted > limit
	due := (limit > 0 && current.bytes >= slice) || current.blobs >= count || time.Since(current.created) >= s.cfg.MaxAge
	if current.blobs > 0 && current.number == next.Current && (due || collect || alone) {
		next.Current++
		live = append(live[:len(live):len(live)], extent{number: next.Current})
	}
	next.Aging, next.Old = r.marks(next, live)

	// A generation is announced to be old first, and dropped once everybody knows and its time is over.
	// What is kept free is as much as a generation, or as somebody waits for.
	free, used := max(slice, wanted), next.Used
	refused := s.refused(time.Now())
	blocked, held := false, false
	for i, e := range live[:len(live)-1] {
		over := limit > 0 && used+reserved+free > limit
		many := blobs+count > s.cfg.MaxBlobs && e.number <= next.Old
		if !over && !many && (refused == "" || i > 0) && (!collect || e.number > now.Old) {
			break
		}
		switch wait := r.wait(e.number); {
		case e.number > now.Old:
			next.Old = max(next.Old, e.number)
			next.Aging = max(next.Aging, e.number)
			blocked = true
		case wait > 0:
			held = held || wait > viewGrace
			blocked = true
		case !blocked:
			next.Dropped = e.number
		}
		used -= e.bytes
		blobs -= e.blobs
	}
	switch left := limit - next.Used - reserved; {
	case full != "":
	case held && left < max(wanted, slice/2):
		full = fmt.Sprintf("what was reported present within the last %v fills %s; a larger --cas-size or a shorter --cas-retention helps", s.cfg.Retention, bytesOf(limit))
	case refused != "" && len(live) == 1:
		full = "the broker refuses to store: " + refused
	}
	next.Full = full
	return next
}

// marks returns up to which generations are aging and old, by what is newer than they are.
func (r *rotator) marks(now state, live []extent) (aging, old uint32) {
	aging, old = now.Aging, now.Old
	newer, blobs := int64(0), int64(0)
	for i := len(live) - 1; i >= 0; i-- {
		e := live[i]
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

// limit is the most bytes that the streams may hold now, 0 for no bound, and why nothing may be stored
// if that is so.
func (r *rotator) limit(used int64) (limit int64, full string) {
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
