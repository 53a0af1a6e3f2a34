package broker

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
)

const (
	// holdBeat is how often a holder says what it holds, and peerTTL how long it counts after that.
	holdBeat = time.Second
	peerTTL  = 10 * time.Second
	// lostAfter is how long a job may be in a lane before the broker is asked whether it is still there: news of a
	// taken job may be lost.
	lostAfter = 2 * time.Second
	// releasers bounds the jobs that are let in at the same time.
	releasers = 32
	// A holder looks at all that is held firstAdoption after its start, when it has heard who lives, and when
	// one leaves or falls silent. At the next maxLook it looks every adoptEvery beats: nobody may have heard
	// of one that died.
	firstAdoption = 3 * holdBeat
	adoptEvery    = 10
	maxLook       = 1000
)

// holdBack lets held jobs in as their turn comes, takes over those of holders that are gone, and tells
// other holders what waits here, until ctx ends.
func (c *Client) holdBack(ctx context.Context) error {
	h := &c.holds
	took, said := make(chan *nats.Msg, 4096), make(chan *nats.Msg, 256)
	for subject, to := range map[string]chan *nats.Msg{tookSubject + h.name: took, flowsSubject: said} {
		sub, err := c.nc.ChanSubscribe(subject, to)
		if err != nil {
			return unavailable(err)
		}
		defer sub.Unsubscribe() //nolint:errcheck // of a connection that is closed nothing is left
	}
	var releasing errgroup.Group
	releasing.SetLimit(releasers)
	care := newCaretaker(c)
	defer c.leave(ctx)
	defer care.wait()
	defer releasing.Wait() //nolint:errcheck // gives no errors
	ticker := time.NewTicker(holdBeat)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-said:
			if h.heard(m.Data) {
				care.look = time.Now()
			}
			continue
		case m := <-took:
			h.taken(m.Data)
			for range len(took) {
				h.taken((<-took).Data)
			}
		case <-h.wake:
		case <-ticker.C:
			care.beat(ctx)
		}
		if !c.nc.IsConnected() {
			continue // nothing can be let in, and turns would be lost
		}
		for _, w := range h.due() {
			if ctx.Err() != nil {
				return nil // the others are in HELD
			}
			releasing.Go(func() error { c.release(ctx, w); return nil })
		}
	}
}

// caretaker is what a holder does with every beat, beside letting jobs in.
type caretaker struct {
	c                  *Client
	counting, adopting errgroup.Group // of one each
	beats              int
	look               time.Time     // when all that is held has to be looked through, or zero
	failed             chan struct{} // a look has failed
}

func newCaretaker(c *Client) *caretaker {
	t := &caretaker{c: c, look: time.Now().Add(firstAdoption), failed: make(chan struct{}, 1)}
	t.counting.SetLimit(1)
	t.adopting.SetLimit(1)
	return t
}

func (t *caretaker) wait() {
	t.counting.Wait() //nolint:errcheck // gives no errors
	t.adopting.Wait() //nolint:errcheck // gives no errors
}

func (t *caretaker) beat(ctx context.Context) {
	t.beats++
	select {
	case <-t.failed:
		t.look = time.Now().Add(peerTTL) // until when others have spoken, if the connection was lost
	default:
	}
	if t.c.beat(ctx) {
		t.look = time.Now()
	}
	t.counting.TryGo(func() error { t.c.recount(ctx); return nil })
	all := !t.look.IsZero() && !time.Now().Before(t.look)
	if !all && t.beats%adoptEvery > 0 {
		return
	}
	started := t.adopting.TryGo(func() error {
		if !t.c.adopt(ctx, all) {
			poke(t.failed)
		}
		return nil
	})
	if started && all {
		t.look = time.Time{}
	}
}

// due returns the jobs whose turn it is.
func (h *holds) due() []*waiting {
	h.mu.Lock()
	defer h.mu.Unlock()
	var due []*waiting
	for _, p := range h.pools {
		for lane := range p.lanes {
			l := &p.lanes[lane]
			for len(l.in) < p.window {
				w := l.queue.pop()
				if w == nil {
					break
				}
				h.drop(w)
				l.in[w.operation] = entered{at: time.Now()}
				due = append(due, w)
			}
		}
	}
	return due
}

// release lets a job in, or makes it wait for another turn. When ctx ends it may stop between any two steps:
// who takes the job over repeats them.
func (c *Client) release(ctx context.Context, w *waiting) {
	bound, cancel := context.WithTimeoutCause(ctx, settleBound, ErrUnavailable)
	defer cancel()
	stays, err := c.letIn(bound, w)
	if stays || ctx.Err() != nil {
		return
	}
	c.holds.mu.Lock()
	delete(c.poolHolds(w.pool).lanes[w.lane].in, w.operation)
	c.holds.mu.Unlock()
	if err == nil {
		c.holds.poke()
		return
	}
	c.log.WarnContext(ctx, "let a held job into the queue", "operation", w.operation, "err", err)
	w.payload = nil // what became of the stored copy is not known
	c.queueHeld(w)
}

// letIn moves a job from HELD to its lane and tells whether it is there now. It is not when it was
// cancelled; one that somebody else has let in does not count.
func (c *Client) letIn(ctx context.Context, w *waiting) (stays bool, err error) {
	payload := w.payload
	if payload == nil {
		if payload, err = c.storedHold(ctx, w.sequence); payload == nil {
			return false, err
		}
	}
	r := &record{Operation: w.operation, Pool: w.pool, Lane: w.lane}
	sequence, err := c.publishOnce(ctx, jobSubjectOf(r), payload)
	if err != nil {
		return false, err
	}
	c.holds.noteStored(r, sequence)
	c.ring(ctx, r)
	if err := c.deleteHold(ctx, w.sequence); err != nil {
		// Whoever finds it later lets the job in again, which the queue refuses, or finds that it is done.
		c.log.WarnContext(ctx, "remove a job that is not held any more", "operation", w.operation, "err", err)
	}
	return sequence > 0, nil
}

// storedHold reads a held job as this holder's, or nil when it is gone.
func (c *Client) storedHold(ctx context.Context, sequence uint64) ([]byte, error) {
	msg, err := c.following(ctx, c.held, sequence, heldSubject+"*.*")
	if err == nil && msg.Sequence != sequence || errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r, err := decodeRecord(msg.Data)
	if err != nil {
		return nil, err
	}
	r.Holder = c.holds.name
	return r.encode()
}

func (c *Client) deleteHold(ctx context.Context, sequence uint64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	err := c.held.DeleteMsg(ctx, sequence)
	if err == nil || isGone(err) {
		return nil
	}
	return unavailable(cause(ctx, err))
}

func (p *poolHolds) idle() bool {
	for lane := range p.lanes {
		if len(p.lanes[lane].in) > 0 {
			return false
		}
	}
	return true
}

// recount asks the broker about the lanes in which something was for a while.
func (c *Client) recount(ctx context.Context) {
	type quiet struct {
		pool string
		lane int
	}
	var ask []quiet
	c.holds.mu.Lock()
	for pool, p := range c.holds.pools {
		for lane := range p.lanes {
			if l := &p.lanes[lane]; l.overdue() {
				l.asked = time.Now()
				ask = append(ask, quiet{pool, lane})
			}
		}
	}
	c.holds.mu.Unlock()
	for _, q := range ask {
		asked := time.Now()
		bound, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
		consumer, err := c.jobs.Consumer(bound, consumerName(q.pool, q.lane))
		cancel()
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound):
		case err != nil:
			return // the next beat asks again
		default:
			info := consumer.CachedInfo()
			c.holds.keep(q.pool, q.lane, info.Delivered.Stream, int(info.NumPending), asked) //nolint:gosec // bounded by the queue
		}
	}
	c.holds.poke()
}

// overdue tells whether one of the jobs that were let in should have been taken, and nobody has asked lately.
func (l *laneHolds) overdue() bool {
	if time.Since(l.asked) <= lostAfter {
		return false
	}
	for _, job := range l.in {
		if time.Since(job.at) > lostAfter {
			return true
		}
	}
	return false
}

// keep forgets the jobs of a lane that somebody was given, which are those up to delivered, and, since some may
// have been removed, the oldest until there are no more than n. Those that came after the broker was asked stay.
func (h *holds) keep(pool string, lane int, delivered uint64, n int, asked time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pools[pool]
	if p == nil {
		return
	}
	l := &p.lanes[lane]
	var old []string
	for operation, job := range l.in {
		switch age := asked.Sub(job.at); {
		case job.sequence > 0 && job.sequence <= delivered, job.sequence == 0 && age > 2*settleBound:
			delete(l.in, operation)
		case job.sequence > 0 && age > lostAfter:
			old = append(old, operation)
		}
	}
	slices.SortFunc(old, func(a, b string) int { return l.in[a].at.Compare(l.in[b].at) })
	for _, operation := range old[:min(len(old), max(0, len(l.in)-n))] {
		delete(l.in, operation)
	}
}

// adopt takes over the jobs of holders that are gone. It looks at all that is held, or at the next maxLook and, once
// it has found one of those, at the rest. It tells whether it could.
func (c *Client) adopt(ctx context.Context, all bool) bool {
	sequence := c.holds.look.Load()
	if all {
		sequence = 0
	}
	for n := 0; all || n < maxLook; n++ {
		msg, err := c.following(ctx, c.held, sequence+1, heldSubject+"*.*")
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			c.holds.look.Store(0)
			return true
		}
		if err != nil {
			c.log.DebugContext(ctx, "look for jobs of dead holders", "err", err)
			return false
		}
		sequence = msg.Sequence
		all = c.adoptOne(ctx, msg) || all
	}
	c.holds.look.Store(sequence)
	return true
}

// adoptOne takes a held job over if its holder is gone, and tells whether it was.
func (c *Client) adoptOne(ctx context.Context, msg *jetstream.RawStreamMsg) bool {
	r, err := decodeRecord(msg.Data)
	if err == nil && c.holds.owned(r) {
		return false
	}
	var current *record
	if err == nil {
		current, _, err = c.read(ctx, r.Operation)
		if isUnavailable(err) || ctx.Err() != nil || errors.Is(err, ErrNotFound) && time.Since(msg.Time) < flightGrace {
			return true
		}
	}
	if err != nil || current.done() {
		if err := c.deleteHold(ctx, msg.Sequence); err != nil {
			c.log.WarnContext(ctx, "remove a held job that nobody needs", "subject", msg.Subject, "err", err)
		}
		return true
	}
	c.queueHeld(&waiting{
		operation: r.Operation, flow: flowOf(r), priority: r.Priority, pool: r.Pool, lane: min(max(r.Lane, 0), lanes-1), sequence: msg.Sequence,
	})
	c.holds.poke()
	c.departed.add(r.Operation) // unless somebody watches it
	return true
}

// owned tells whether a live holder lets a job in, or will take it over.
func (h *holds) owned(r *record) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held[r.Operation] != nil {
		return true
	}
	if r.Holder != h.name {
		_, alive := h.peers[r.Holder]
		return alive || !h.heir(r.Operation)
	}
	p := h.pools[r.Pool]
	if p == nil || r.Lane < 0 || r.Lane >= lanes {
		return false
	}
	_, in := p.lanes[r.Lane].in[r.Operation]
	return in
}

// heir tells whether this holder takes an orphan over, and none of the others that hold something: each job has
// one heir, so that it is counted once. It is called with mu held.
func (h *holds) heir(operation string) bool {
	mine := claim(h.name, operation)
	for peer := range h.peers {
		if claim(peer, operation) > mine {
			return false
		}
	}
	return true
}

// claim is a number that each holder has on a job, and that all know.
func claim(holder, operation string) uint64 {
	sum := sha256.Sum256([]byte(holder + operation))
	return binary.BigEndian.Uint64(sum[:])
}
