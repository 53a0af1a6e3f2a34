package broker

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
)

// A stream gives its messages out in the order in which they came, so a build of 50 000 actions would be
// in front of everybody who comes later. Therefore the queue is kept short: a process that submits lets
// as many jobs into a lane as keep its workers from ever waiting, and holds the others back. A held job
// is a message in the stream HELD, so it outlives the process, and an entry in memory that says whose
// turn it is. A worker that takes a job tells the holder, who lets the next one in.
//
// When a holder dies, others take its jobs over (letin.go). Nothing here decides whether a job runs, or
// runs once: a job that is let in twice is refused by the queue, and one that was let in although its
// operation has ended is dropped by the worker that gets it.

const (
	// A lane has spareJobs, and one for every slotsPerSpare slots of its workers: enough to bring in the
	// next ones while these are taken.
	spareJobs, slotsPerSpare = 8, 2
	// burst is how many jobs of a build are in a sooner lane than their priority says, and burstRefill how
	// long it takes until it may have one more: a small build passes by a large one.
	burst       = 32
	burstRefill = time.Second
	// keptPayload is the largest job that is kept in memory while it is held; larger ones are read again.
	keptPayload = 2 << 10
)

// holds is what this process holds back, and what it has let in that no worker has taken.
type holds struct {
	name string // of this holder
	wake chan struct{}

	mu      sync.Mutex
	held    map[string]*waiting    // guarded by mu, by operation; of all lanes, without those being let in
	pools   map[string]*poolHolds  // guarded by mu, by pool
	bursts  map[flow]*bucket       // guarded by mu; those that are not full
	tenants map[string]int         // guarded by mu; how many of held each has
	peers   map[string]holderState // guarded by mu, by name; what other holders have said
	said    bool                   // guarded by mu; whether the others have heard of something held
	beaten  time.Time              // guarded by mu; the last beat

	look atomic.Uint64 // where in HELD adopt goes on
}

// poolHolds is what is held of one pool and let into its lanes.
type poolHolds struct {
	lanes  [lanes]laneHolds
	window int // jobs that this process may have in each lane
}

type laneHolds struct {
	queue fairQueue
	in    map[string]entered // operations that were let in and not yet taken
	asked time.Time          // when the broker was last asked about them
}

// entered is a job that was let in.
type entered struct {
	at       time.Time
	sequence uint64 // in JOBS, or 0 until the broker has confirmed it
}

// bucket is what a build has left of its burst.
type bucket struct {
	tokens int
	at     time.Time
}

func (h *holds) init() {
	h.name, h.wake = newName(), make(chan struct{}, 1)
	h.held, h.pools, h.bursts = map[string]*waiting{}, map[string]*poolHolds{}, map[flow]*bucket{}
	h.tenants, h.peers = map[string]int{}, map[string]holderState{}
}

// flowOf returns who a job waits for.
func flowOf(r *record) flow {
	_, instance, _ := strings.Cut(r.Action.Space, "-")
	f := flow{tenant: instance, build: r.Invocation}
	metadata := new(repb.RequestMetadata)
	if len(r.Metadata) > 0 && proto.Unmarshal(r.Metadata, metadata) == nil && metadata.GetCorrelatedInvocationsId() != "" {
		f.build = fmt.Sprintf("%.*s", maxInvocation, metadata.GetCorrelatedInvocationsId())
	}
	return f
}

// poolHolds returns what is held of a pool. It is called with mu held.
func (c *Client) poolHolds(pool string) *poolHolds {
	p := c.holds.pools[pool]
	if p == nil {
		p = &poolHolds{}
		for lane := range p.lanes {
			p.lanes[lane].in = map[string]entered{}
		}
		c.holds.pools[pool] = p
		p.window = c.windowOf(pool, p)
	}
	return p
}

// place decides the lane of a new job and whether it may go there at once.
func (c *Client) place(r *record) (now bool) {
	h := &c.holds
	h.mu.Lock()
	defer h.mu.Unlock()
	r.Lane = laneOf(r.Priority)
	if h.spend(flowOf(r)) {
		r.Lane--
	}
	if !c.submits {
		return true
	}
	r.Holder = h.name
	p := c.poolHolds(r.Pool)
	l := &p.lanes[r.Lane]
	if l.queue.size > 0 || len(l.in) >= p.window {
		return false
	}
	l.in[r.Operation] = entered{at: time.Now()}
	return true
}

// noteStored notes where in JOBS a job is that was let in. The sequence is 0 when it had been there before: it does
// not count then, since somebody else may hear when it is taken.
func (h *holds) noteStored(r *record, sequence uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pools[r.Pool]
	if p == nil || r.Lane < 0 || r.Lane >= lanes {
		return
	}
	l := &p.lanes[r.Lane]
	job, in := l.in[r.Operation]
	switch {
	case !in || job.sequence > 0:
	case sequence > 0:
		job.sequence = sequence
		l.in[r.Operation] = job
	default:
		delete(l.in, r.Operation)
		h.poke()
	}
}

// spend takes one of what a build has left of its burst. It is called with mu held.
func (h *holds) spend(f flow) bool {
	b := h.bursts[f]
	if b == nil {
		b = &bucket{tokens: burst, at: time.Now()}
		h.bursts[f] = b
	}
	if n := int(time.Since(b.at) / burstRefill); n > 0 {
		b.tokens, b.at = min(burst, b.tokens+n), time.Now()
	}
	if b.tokens == 0 {
		return false
	}
	b.tokens--
	return true
}

// crowded tells whether a tenant has as many held jobs as it may, here and elsewhere.
func (c *Client) crowded(tenant string) bool {
	h := &c.holds
	h.mu.Lock()
	defer h.mu.Unlock()
	n := h.tenants[tenant]
	for _, peer := range h.peers {
		n += peer.Tenants[tenant]
	}
	return int64(n) >= c.maxTenant
}

// hold stores a job that has to wait for its turn.
func (c *Client) hold(ctx context.Context, job *record) error {
	f := flowOf(job)
	if c.crowded(f.tenant) {
		return fmt.Errorf("%w: %d operations of this instance name wait", ErrQueueFull, c.maxTenant)
	}
	payload, err := job.encode()
	if err != nil {
		return err
	}
	sequence, err := c.publishOnce(ctx, heldSubjectOf(job), payload)
	if err == nil && sequence == 0 { // an earlier try, whose answer was lost
		var stored *jetstream.RawStreamMsg
		if stored, err = c.last(ctx, c.held, heldSubjectOf(job)); err == nil {
			sequence = stored.Sequence
		}
	}
	if err != nil {
		return err
	}
	if len(payload) > keptPayload {
		payload = nil
	}
	c.queueHeld(&waiting{
		operation: job.Operation, flow: f, priority: job.Priority, pool: job.Pool, lane: job.Lane, sequence: sequence, payload: payload,
	})
	c.holds.poke()
	return nil
}

// isHeld tells whether an operation waits in this process for its turn.
func (h *holds) isHeld(operation string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.held[operation] != nil
}

// queueHeld makes a job that is stored in HELD wait for its turn, unless it does already.
func (c *Client) queueHeld(w *waiting) {
	h := &c.holds
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held[w.operation] == nil {
		h.held[w.operation] = w
		h.tenants[w.flow.tenant]++
		c.poolHolds(w.pool).lanes[w.lane].queue.push(w)
	}
}

// poke makes Run look whether jobs can be let in.
func (h *holds) poke() { poke(h.wake) }

func poke(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// Held counts the operations that wait in this process for their turn.
func (c *Client) Held() int {
	c.holds.mu.Lock()
	defer c.holds.mu.Unlock()
	return len(c.holds.held)
}

// forget drops what is known of a job that needs no turn any more, and tells the sequence of its stored
// copy if it was held here.
func (h *holds) forget(r *record) (sequence uint64, held bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pools[r.Pool]
	if p == nil || r.Lane < 0 || r.Lane >= lanes {
		return 0, false
	}
	l := &p.lanes[r.Lane]
	delete(l.in, r.Operation)
	w := h.held[r.Operation]
	if w == nil {
		return 0, false
	}
	l.queue.remove(w)
	h.drop(w)
	return w.sequence, true
}

// drop is called with mu held, after w has left its queue.
func (h *holds) drop(w *waiting) {
	delete(h.held, w.operation)
	if h.tenants[w.flow.tenant]--; h.tenants[w.flow.tenant] == 0 {
		delete(h.tenants, w.flow.tenant)
	}
}

// taken notes that a worker has a job.
func (h *holds) taken(payload []byte) {
	pool, rest, _ := strings.Cut(string(payload), " ")
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pools[pool]
	if p == nil || len(rest) < 2 || rest[0] < '0' || rest[0] >= '0'+lanes {
		return
	}
	delete(p.lanes[rest[0]-'0'].in, rest[2:])
}

// tellHolder lets the holder of a job know that it was taken. Losing that costs a moment.
func (q *Queue) tellHolder(ctx context.Context, r *record) {
	if !validName(r.Holder) {
		return
	}
	if err := q.c.nc.Publish(tookSubject+r.Holder, fmt.Appendf(nil, "%s %d %s", r.Pool, r.Lane, r.Operation)); err != nil {
		q.c.log.WarnContext(ctx, "tell that a job was taken", "operation", r.Operation, "err", err)
	}
}
