package objectstore

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sync/semaphore"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

const (
	// placeBound is how long an upload waits for the rotator to make room.
	placeBound = 10 * time.Second
	// placeAgain is how often it asks for it.
	placeAgain = 200 * time.Millisecond

	// smallOverhead and chunkOverhead are more than what a blob takes of its streams beyond its bytes:
	// subjects, headers, metadata, and positions of chunks.
	smallOverhead = 1 << 10
	chunkOverhead = 512
)

// costOf is how many bytes of a stream a blob takes that is stored in size bytes, rounded up.
func costOf(d digest.Digest, size int64) int64 {
	if familyOf(d) == small {
		return size + smallOverhead
	}
	return size + smallOverhead + int64(chunksOf(d))*chunkOverhead
}

// ledger keeps the streams within their limit. It knows what they held at the last measurement, what
// this process has stored since, and what its uploads under way may still store. What other
// processes store between two measurements is what the rotator's headroom is for.
type ledger struct {
	mu       sync.Mutex
	limit    int64         // guarded by mu, as is the rest; 0 is none
	margin   int64         // of the limit, left to other processes
	full     string        // why nothing may be stored
	used     int64         // at the last measurement
	written  [3]int64      // stored by this process since: newest first
	reserved int64         // what uploads may still store
	wanted   int64         // the most that anybody waits for
	changed  chan struct{} // is closed when there may be room
}

func newLedger() *ledger { return &ledger{changed: make(chan struct{})} }

// total is what the streams may hold once all uploads under way have ended; l.mu must be held.
func (l *ledger) total() int64 {
	return l.used + l.written[0] + l.written[1] + l.written[2] + l.reserved
}

// reserve takes room for an upload, or for a copy of an old blob, for which a quarter of a generation is
// left free, since uploads must not crowd out what is in use. When there is none, it returns why, if that is for good, and a
// channel that is closed when there may be some.
func (l *ledger) reserve(cost int64, copies bool) (ok bool, full string, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.full != "" && !copies:
		return false, l.full, nil
	case l.limit > 0 && cost > l.limit:
		return false, fmt.Sprintf("a blob of %s does not fit the store of %s; a larger --cas-size helps", bytesOf(cost), bytesOf(l.limit)), nil
	}
	margin := l.margin
	if !copies {
		margin += l.limit / slicing / 4
	}
	if whole := l.limit > 0 && l.total() == 0; l.limit > 0 && !whole && l.total()+cost+margin > l.limit {
		l.wanted = max(l.wanted, cost+margin)
		return false, "", l.changed
	}
	l.reserved += cost
	return true, "", nil
}

// release gives back what an upload did not use.
func (l *ledger) release(rest int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reserved -= rest
	if l.limit > 0 {
		l.notify()
	}
}

// spend turns reserved bytes into stored ones.
func (l *ledger) spend(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reserved -= n
	l.written[0] += n
}

// notify wakes who waits for room; l.mu must be held.
func (l *ledger) notify() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// want records that somebody waits for room.
func (l *ledger) want(cost int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wanted = max(l.wanted, cost)
}

// told enters what the rotator of another process has measured. It may have begun to measure before
// what this process stored since the measurement before the last, so that is counted again.
func (l *ledger) told(s state) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.written = [3]int64{0, l.written[0], l.written[1]}
	l.used, l.limit, l.full, l.margin = s.Used, s.Limit, s.Full, s.Limit/slicing/4
	l.notify()
}

// begin is called before this process measures, and measured after.
func (l *ledger) begin() (before int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written[0] + l.written[1] + l.written[2]
}

func (l *ledger) measured(before, used, limit int64, full string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	since := l.written[0] + l.written[1] + l.written[2] - before
	l.written = [3]int64{since}
	l.used, l.limit, l.full, l.margin = used, limit, full, 0
	l.notify()
}

// needs returns what was stored since begin and may still be, and what is waited for, which it forgets.
func (l *ledger) needs(before int64) (more, wanted int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	more, wanted = l.total()-l.used-before, l.wanted
	l.wanted = 0
	return more, wanted
}

// stored is what the streams hold, as far as this process knows.
func (l *ledger) stored() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total() - l.reserved
}

// since is what was stored since the last measurement.
func (l *ledger) since() (written, limit int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written[0], l.limit
}

// room is what one upload may take of a bucket. It stands for the budget of bytes on their way, so
// that what the broker has acknowledged is no longer reserved.
type room struct {
	*semaphore.Weighted
	ledger *ledger

	small bool

	mu    sync.Mutex
	left  int64 // guarded by mu, as is the rest
	began bool  // something was sent
}

// Release gives back bytes on their way, which are stored now.
func (r *room) Release(n int64) {
	r.Weighted.Release(n)
	r.mu.Lock()
	n = min(n, r.left)
	r.left -= n
	r.began = true
	r.mu.Unlock()
	r.ledger.spend(n)
}

// end gives back what was not needed. Much of what a small blob takes are its subjects.
func (r *room) end() {
	r.mu.Lock()
	left := r.left
	r.left = 0
	r.mu.Unlock()
	if r.small && r.began {
		r.ledger.spend(left)
		return
	}
	r.ledger.release(left)
}

// budget bounds the bytes that were sent to a stream and are not acknowledged.
type budget interface {
	Acquire(ctx context.Context, n int64) error
	TryAcquire(n int64) bool
	Release(n int64)
}

// place returns where to store a blob that takes size bytes of a stream, which are set aside until
// done is called. The error wraps cas.ErrFull when there is no room and none was made in time.
func (s *Store) place(ctx context.Context, d digest.Digest, size int64) (b *bucket, done func(), err error) {
	cost := costOf(d, size)
	if err := s.admit(ctx, cost); err != nil {
		return nil, nil, err
	}
	g := s.current()
	placed := *g.bucket(d)
	r := &room{Weighted: placed.flow, ledger: s.ledger, small: placed.family == small, left: cost}
	placed.budget = r
	return &placed, r.end, nil
}

// copying marks the context of a copy forward.
type copying struct{}

func isCopy(ctx context.Context) bool { return ctx.Value(copying{}) != nil }

// admit sets room aside.
func (s *Store) admit(ctx context.Context, cost int64) error {
	copies := isCopy(ctx)
	ok, full, changed := s.ledger.reserve(cost, copies)
	if ok && s.known().Old < s.current().number {
		s.hurry(ctx)
		return nil
	}
	if ok {
		s.ledger.release(cost)
	}
	bound := time.NewTimer(placeBound)
	defer bound.Stop()
	again := time.NewTicker(placeAgain)
	defer again.Stop()
	for {
		switch {
		case full != "":
			return fmt.Errorf("%w: %s", cas.ErrFull, full)
		case ok:
			wake(s.turn) // this process has not noticed the newest generation yet
			changed = nil
		default:
			s.ask(ctx) //nolint:errcheck // the next look may succeed
			s.tell(ctx, announcement{Want: cost})
			wake(s.work)
		}
		select {
		case <-changed:
		case <-again.C:
		case <-bound.C:
			return fmt.Errorf("%w: no room for %s was made within %v", cas.ErrFull, bytesOf(cost), placeBound)
		case <-ctx.Done():
			return ended(ctx)
		}
		if ok, full, changed = s.ledger.reserve(cost, copies); ok {
			if s.known().Old < s.current().number {
				return nil
			}
			s.ledger.release(cost)
		}
	}
}

// hurry has the streams measured when this process has stored much since the last time.
func (s *Store) hurry(ctx context.Context) {
	written, limit := s.ledger.since()
	if limit == 0 || written < limit/slicing/hurries {
		return
	}
	if v := s.known(); v.Holder == s.name {
		wake(s.work)
	} else if time.Since(v.asked) >= viewAge {
		s.tell(ctx, announcement{Want: 1})
		s.ask(ctx) //nolint:errcheck // the account just stays as it is
	}
}

// hurries is how often the streams are measured while a generation fills.
const hurries = 8

func bytesOf(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
