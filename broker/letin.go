package broker

import (
	"cmp"
	"context"
	"encoding/json"
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
	// lostAfter is how long nothing may be taken from a lane before the broker is asked how many of its
	// jobs are still there: news of a taken job may be lost.
	lostAfter = 2 * time.Second
	// releasers bounds the jobs that are let in at the same time.
	releasers = 32
	// maxTenants bounds the tenants that a holder names to the others, those with the most jobs first.
	maxTenants = 100
	// A holder looks for jobs of dead ones firstAdoption beats after its start, when it has heard who
	// lives, when one falls silent, and every adoptEvery beats.
	firstAdoption, adoptEvery = 3, 30
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
	var releasing, checking errgroup.Group
	releasing.SetLimit(releasers)
	checking.SetLimit(1)
	defer checking.Wait()  //nolint:errcheck // gives no errors
	defer releasing.Wait() //nolint:errcheck // gives no errors
	ticker := time.NewTicker(holdBeat)
	defer ticker.Stop()
	silent := false
	for beats := 1; ; {
		select {
		case <-ctx.Done():
			return nil
		case m := <-said:
			h.heard(m.Data)
			continue
		case m := <-took:
			h.taken(m.Data)
			for range len(took) {
				h.taken((<-took).Data)
			}
		case <-h.wake:
		case <-ticker.C:
			silent = c.beat(ctx) || silent
			all, some := silent || beats == firstAdoption, beats%adoptEvery == 0
			if checking.TryGo(func() error { c.recount(ctx); c.adopt(ctx, all, some); return nil }) {
				silent = false
				beats++
			}
		}
		for _, w := range h.due() {
			releasing.Go(func() error { c.release(ctx, w); return nil })
		}
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
				l.in[w.operation], l.took = time.Now(), time.Now()
				due = append(due, w)
			}
		}
	}
	return due
}

// release lets a job in, or makes it wait for another turn.
func (c *Client) release(ctx context.Context, w *waiting) {
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	stays, err := c.letIn(ctx, w)
	if stays {
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
// cancelled, or somebody else has let it in.
func (c *Client) letIn(ctx context.Context, w *waiting) (stays bool, err error) {
	payload := w.payload
	if payload == nil {
		if payload, err = c.storedHold(ctx, w.sequence); payload == nil {
			return false, err
		}
	}
	r := &record{Operation: w.operation, Pool: w.pool, Lane: w.lane}
	if _, err := c.publishOnce(ctx, jobSubjectOf(r), payload); err != nil {
		return false, err
	}
	c.ring(ctx, r)
	if err := c.deleteHold(ctx, w.sequence); err != nil {
		// Whoever finds it later lets the job in again, which the queue refuses, or finds that it is done.
		c.log.WarnContext(ctx, "remove a job that is not held any more", "operation", w.operation, "err", err)
	}
	return true, nil
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

// heard notes what another holder says.
func (h *holds) heard(payload []byte) {
	var s holderState
	if json.Unmarshal(payload, &s) != nil || s.Holder == h.name || !validName(s.Holder) {
		return
	}
	s.at = time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(s.Builds) == 0 {
		delete(h.peers, s.Holder)
	} else {
		h.peers[s.Holder] = s
	}
}

// beat brings the windows up to date and tells others what is held. It returns whether a holder fell
// silent.
func (c *Client) beat(ctx context.Context) (silent bool) {
	h := &c.holds
	h.mu.Lock()
	for name, peer := range h.peers {
		if time.Since(peer.at) > peerTTL {
			delete(h.peers, name)
			silent = true
		}
	}
	state := holderState{Holder: h.name, Builds: map[string]int{}, Tenants: h.most()}
	for pool, p := range h.pools {
		p.window = c.windowOf(pool, p)
		if n := p.builds(); n > 0 {
			state.Builds[pool] = n
		} else if p.idle() {
			delete(h.pools, pool)
		}
	}
	for f, b := range h.bursts {
		if b.tokens+int(time.Since(b.at)/burstRefill) >= burst {
			delete(h.bursts, f)
		}
	}
	says := len(state.Builds) > 0 || h.said
	h.said = len(state.Builds) > 0
	h.mu.Unlock()
	if !says {
		return silent
	}
	payload, err := json.Marshal(state)
	if err == nil {
		err = c.nc.Publish(flowsSubject, payload)
	}
	if err != nil {
		c.log.WarnContext(ctx, "tell what is held", "err", err)
	}
	return silent
}

// most returns the tenants with the most held jobs. It is called with mu held.
func (h *holds) most() map[string]int {
	names := make([]string, 0, len(h.tenants))
	for name := range h.tenants {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Compare(h.tenants[b], h.tenants[a]) })
	most := map[string]int{}
	for _, name := range names[:min(len(names), maxTenants)] {
		most[name] = h.tenants[name]
	}
	return most
}

func (p *poolHolds) idle() bool {
	for lane := range p.lanes {
		if len(p.lanes[lane].in) > 0 {
			return false
		}
	}
	return true
}

// recount asks the broker how many jobs are in the lanes from which nothing was taken for a while.
func (c *Client) recount(ctx context.Context) {
	type quiet struct {
		pool string
		lane int
	}
	var ask []quiet
	c.holds.mu.Lock()
	for pool, p := range c.holds.pools {
		for lane := range p.lanes {
			if l := &p.lanes[lane]; len(l.in) > 0 && time.Since(l.took) > lostAfter {
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
		if err != nil {
			continue
		}
		c.holds.keep(q.pool, q.lane, int(consumer.CachedInfo().NumPending), asked) //nolint:gosec // bounded by the queue
	}
	c.holds.poke()
}

// keep forgets the oldest jobs of a lane until there are n, except those that were let in since.
func (h *holds) keep(pool string, lane, n int, asked time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pools[pool]
	if p == nil {
		return
	}
	l := &p.lanes[lane]
	var old []string
	for operation, at := range l.in {
		if at.Before(asked.Add(-lostAfter)) {
			old = append(old, operation)
		}
	}
	slices.SortFunc(old, func(a, b string) int { return l.in[a].Compare(l.in[b]) })
	for _, operation := range old[:min(len(old), max(0, len(l.in)-n))] {
		delete(l.in, operation)
	}
	l.took = time.Now()
}

// adopt takes over the jobs of holders that are gone: looking at all of them, or at all if the oldest is
// one of those.
func (c *Client) adopt(ctx context.Context, all, some bool) {
	if !all && !some {
		return
	}
	for sequence := uint64(1); ctx.Err() == nil; {
		msg, err := c.following(ctx, c.held, sequence, heldSubject+"*.*")
		if err != nil {
			if !errors.Is(err, jetstream.ErrMsgNotFound) {
				c.log.DebugContext(ctx, "look for jobs of dead holders", "err", err)
			}
			return
		}
		sequence = msg.Sequence + 1
		orphan := c.adoptOne(ctx, msg)
		if !all && !orphan {
			return
		}
		all = true
	}
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
		if isUnavailable(err) || errors.Is(err, ErrNotFound) && time.Since(msg.Time) < flightGrace {
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

// owned tells whether a live holder lets a job in.
func (h *holds) owned(r *record) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held[r.Operation] != nil {
		return true
	}
	if r.Holder != h.name {
		_, alive := h.peers[r.Holder]
		return alive
	}
	p := h.pools[r.Pool]
	if p == nil || r.Lane < 0 || r.Lane >= lanes {
		return false
	}
	_, in := p.lanes[r.Lane].in[r.Operation]
	return in
}
