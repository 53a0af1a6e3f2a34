package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
)

// Queue is a worker's end of the job queue. Run keeps its leases and its registration alive; Next
// takes one job at a time, so a worker calls it only when it has room for one.
//
// Every pool has a durable consumer per lane. Next asks them in turn without waiting and sleeps,
// when all are empty, until a submitter rings one of its pools or it is time for its patrol. Rejected:
// long polls on several consumers at once, which deliver more jobs than were asked for.
type Queue struct {
	c    *Client
	self WorkerInfo

	mu       sync.Mutex
	leases   map[*Lease]struct{} // guarded by mu
	draining bool                // guarded by mu
	trouble  string              // guarded by mu; why the worker has taken itself out, or ""
	turned   chan struct{}       // guarded by mu; closed and replaced when draining or trouble changes

	shaped time.Time // guarded by mu; when this worker's platform was last remembered

	sub *nats.Subscription // guarded by mu; of the inbox

	// Next alone uses these.
	sweeps  int
	idles   time.Duration // how long to sleep the next time
	rest    time.Duration // most of that: idleSweep, but in tests
	pulls   uint64
	inbox   string
	replies chan *nats.Msg
	bells   bells
	bound   time.Duration // pullBound, but in tests
	patrol  patrol
}

// An idle worker looks again when nobody rings: a job that was redelivered rings for nobody. And the
// broker may answer that there is no job a moment after it has confirmed one, whose bell rang before this
// worker listened. So it looks again soon at first, and then less and less often.
const (
	idleSweep  = time.Second
	firstSweep = 2 * time.Millisecond
	laterSweep = 16 // times as long as the one before
)

// pullBound is how long the broker may take to answer a pull.
const pullBound = requestTimeout

// fair is how many sweeps begin with the first lane before one begins with another, each in its turn, so
// that a full lane leaves the others a share.
const fair = 8

// Queue returns the queue as the worker self sees it. Its name must be a valid subject token.
func (c *Client) Queue(self WorkerInfo) *Queue {
	self.Incarnation, self.Started = newName(), time.Now().UTC()
	q := &Queue{c: c, self: self, leases: map[*Lease]struct{}{}, turned: make(chan struct{}), bound: pullBound, rest: idleSweep}
	q.bells = bells{q: q, rung: make(chan *nats.Msg, bellBuffer)}
	q.patrol = newPatrol(q)
	return q
}

// Run renews the leases and the registration, and does what operators ask, until ctx ends; then it
// removes the registration. It must go on until the last lease is settled or returned.
func (q *Queue) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return q.every(ctx, q.c.ackWait/3, q.renew) })
	group.Go(func() error { return q.every(ctx, workerBeat, q.register) })
	group.Go(func() error { return q.obey(ctx) })
	err := group.Wait()
	q.closeInbox(ctx)
	gone, cancel := detach(ctx, requestTimeout)
	defer cancel()
	if err := q.c.registry.Delete(gone, q.self.Name); err != nil {
		q.c.log.WarnContext(gone, "leave the worker registry", "worker", q.self.Name, "err", err)
	}
	return err
}

// Isolated sets what the registry says of the worker's isolation, which is known only once it has been
// tried. It is called before Run.
func (q *Queue) Isolated(mode string) { q.self.Isolation = mode }

// Drain makes the registry say that this worker takes no more jobs.
func (q *Queue) Drain(ctx context.Context) {
	q.mu.Lock()
	q.draining = true
	q.mu.Unlock()
	q.register(ctx)
}

func (q *Queue) every(ctx context.Context, interval time.Duration, do func(context.Context)) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		do(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// info is what this worker says of itself.
func (q *Queue) info() WorkerInfo {
	q.mu.Lock()
	defer q.mu.Unlock()
	info := q.self
	info.Busy, info.Draining, info.Trouble = len(q.leases), q.draining, q.trouble
	return info
}

func (q *Queue) register(ctx context.Context) {
	info := q.info()
	value, err := json.Marshal(info)
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
		defer cancel()
		_, err = q.c.registry.Put(ctx, info.Name, value)
		if err == nil {
			err = q.remember(ctx)
		}
	}
	if err != nil && ctx.Err() == nil {
		q.c.log.WarnContext(ctx, "report to the worker registry", "worker", info.Name, "err", err)
	}
}

// renew tells the broker that every leased job is in progress.
func (q *Queue) renew(ctx context.Context) {
	q.mu.Lock()
	leases := make([]*Lease, 0, len(q.leases))
	for l := range q.leases {
		leases = append(leases, l)
	}
	q.mu.Unlock()
	for _, l := range leases {
		if l.over.Load() {
			continue
		}
		if err := q.c.nc.Publish(l.ack, []byte(ackInProgress)); err != nil {
			q.c.log.WarnContext(ctx, "renew lease", "operation", l.record.Operation, "err", err)
		}
	}
}

// Next returns the next job that this worker may run, and waits for one until ctx ends. An
// unreachable broker is no error: Next waits. It must not be called by two goroutines at once.
func (q *Queue) Next(ctx context.Context) (*Lease, error) {
	for {
		takes, turned := q.takesJobs()
		if !takes {
			q.bells.stop(ctx)
			select {
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			case <-turned:
			}
			continue
		}
		lease, err := q.look(ctx, turned)
		switch {
		case ctx.Err() != nil:
			q.bells.stop(ctx)
			if lease != nil {
				lease.giveBack(ctx)
			}
			return nil, context.Cause(ctx)
		case lease != nil:
			q.idles = 0
			if q.full() {
				q.bells.stop(ctx)
			}
			q.patrol.ring(ctx)
			return lease, nil
		case err != nil:
			q.c.log.WarnContext(ctx, "take a job", "err", err)
			if err := pause(ctx, 6); err != nil {
				return nil, err
			}
		}
	}
}

// look asks every lane for a job and then sleeps until there is a reason to look again, or turned is
// closed.
func (q *Queue) look(ctx context.Context, turned <-chan struct{}) (*Lease, error) {
	pools, changed := q.c.view.serves(q.self.Platform)
	lease, err := q.patrol.sweep(ctx, pools)
	if lease != nil || err != nil || ctx.Err() != nil {
		return lease, err
	}
	if q.bells.listen(ctx, pools) {
		return nil, nil //nolint:nilnil // a job may have come before the bell was heard
	}
	return q.idle(ctx, pools, changed, turned)
}

// idle waits for a reason to look for a job again. A bell says where to look first.
func (q *Queue) idle(ctx context.Context, pools []string, changed, turned <-chan struct{}) (*Lease, error) {
	q.idles = min(max(firstSweep, laterSweep*q.idles), q.rest)
	timer := time.NewTimer(q.idles/2 + rand.N(q.idles)) //nolint:gosec // jitter needs no secrecy
	defer timer.Stop()
	for {
		select {
		case bell := <-q.bells.rung:
			return q.patrol.answer(ctx, bell)
		case <-ctx.Done():
		case <-changed:
			var now []string
			if now, changed = q.c.view.serves(q.self.Platform); slices.Equal(now, pools) {
				continue // workers come and go
			}
		case <-turned:
		case <-timer.C:
			q.patrol.due = q.idles == q.rest
		}
		return nil, nil //nolint:nilnil // no job and no error sends Next into another sweep
	}
}

// full tells whether the worker has as many jobs as slots.
func (q *Queue) full() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.leases) >= q.self.Slots
}

// sweep asks each lane of each pool for a job until one has it, an answer fails to come, or ctx ends.
func (q *Queue) sweep(ctx context.Context, pools []string) (*Lease, error) {
	q.sweeps++
	first, turn := 0, q.sweeps
	if q.sweeps%fair == 0 {
		turn = q.sweeps / fair
		first, turn = 1+turn%(lanes-1), turn/(lanes-1)
	}
	for i := range lanes {
		for n := range pools {
			lease, err := q.pull(ctx, consumerName(pools[(n+turn)%len(pools)], (first+i)%lanes))
			if lease != nil || err != nil || ctx.Err() != nil {
				return lease, err
			}
		}
	}
	return nil, nil //nolint:nilnil // no job and no error is the common answer
}

// The payloads of a pull and of acknowledgements.
const (
	pullRequest   = `{"batch":1,"no_wait":true}`
	ackInProgress = "+WPI"
	ackDone       = "+ACK"
	ackTerminate  = "+TERM"
)

// pull takes one job from a consumer, or none. It does not end with a context: a job that is
// delivered to nobody is lost to all until AckWait has passed. After pullBound the inbox is given up,
// with whatever still comes to it.
//
// The replies have a subscription of their own. A delivered job keeps the subject that it was stored
// under, so the reply multiplexer of the client library cannot tell whose it is and drops it when
// other requests are open.
func (q *Queue) pull(ctx context.Context, consumer string) (*Lease, error) {
	if err := q.openInbox(); err != nil {
		return nil, err
	}
	q.pulls++
	reply := q.inbox + "." + strconv.FormatUint(q.pulls, 10)
	if err := q.c.nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+jobsStream+"."+consumer, reply, []byte(pullRequest)); err != nil {
		return nil, unavailable(err)
	}
	timer := time.NewTimer(q.bound)
	defer timer.Stop()
	for {
		select {
		case msg := <-q.replies:
			switch {
			case msg.Reply != "":
				return q.lease(ctx, msg)
			case msg.Subject == reply: // a status: no job for now, or no such consumer
				return nil, nil //nolint:nilnil // no job and no error is the common answer
			}
		case <-timer.C:
			q.abandonInbox(ctx)
			return nil, fmt.Errorf("%w: no answer from consumer %s within %v", ErrUnavailable, consumer, q.bound)
		}
	}
}

// openInbox subscribes to the replies at the first pull.
func (q *Queue) openInbox() error {
	if q.replies != nil {
		return nil
	}
	q.inbox, q.replies = nats.NewInbox(), make(chan *nats.Msg, bellBuffer)
	sub, err := q.c.nc.ChanSubscribe(q.inbox+".*", q.replies)
	if err != nil {
		q.replies = nil
		return unavailable(err)
	}
	q.mu.Lock()
	q.sub = sub
	q.mu.Unlock()
	return nil
}

// abandonInbox makes the next pull open a new inbox. A job that an earlier pull asked for must not be
// taken for the answer to a later one: it may have gone to another worker by then.
func (q *Queue) abandonInbox(ctx context.Context) {
	q.closeInbox(ctx)
	for {
		select {
		case msg := <-q.replies:
			if msg.Reply != "" {
				q.c.nakAfter(ctx, msg.Reply, returnDelay)
			}
		default:
			q.replies = nil
			return
		}
	}
}

func (q *Queue) closeInbox(ctx context.Context) {
	q.mu.Lock()
	sub := q.sub
	q.sub = nil
	q.mu.Unlock()
	if sub == nil {
		return
	}
	if err := sub.Unsubscribe(); err != nil && !q.c.nc.IsClosed() {
		q.c.log.WarnContext(ctx, "close the inbox of the queue", "err", err)
	}
}

func (q *Queue) lease(ctx context.Context, msg *nats.Msg) (*Lease, error) {
	r, err := decodeRecord(msg.Data)
	if err == nil {
		_, err = r.Action.digest()
	}
	if err != nil {
		q.c.log.ErrorContext(ctx, "unreadable job removed", "subject", msg.Subject, "err", err)
		return nil, q.c.removeUnreadable(ctx, msg.Subject, msg.Reply)
	}
	metadata, err := msg.Metadata()
	if err != nil {
		return nil, fmt.Errorf("job %s: %w", r.Operation, err)
	}
	if (metadata.NumDelivered > 1 || len(r.Failures) > 0) && q.shuns(ctx, r) {
		q.c.nakAfter(ctx, msg.Reply, shunDelay)
		return nil, nil //nolint:nilnil // no job for this worker
	}
	l := &Lease{q: q, record: r, ack: msg.Reply, first: metadata.NumDelivered == 1}
	if err := q.c.nc.Publish(l.ack, []byte(ackInProgress)); err != nil {
		return nil, unavailable(err)
	}
	q.tellHolder(ctx, r)
	q.mu.Lock()
	q.leases[l] = struct{}{}
	q.mu.Unlock()
	return l, nil
}

func (q *Queue) forget(l *Lease) {
	q.mu.Lock()
	delete(q.leases, l)
	q.mu.Unlock()
}

// bells listens for submitters while a worker has a free slot. A bell carries the name of the
// consumer that has the job and rings for one worker only; one that rang for nothing is passed on.
type bells struct {
	q     *Queue
	rung  chan *nats.Msg
	subs  []*nats.Subscription
	pools []string
}

// listen subscribes to the bells of pools and tells whether it had not yet listened to all of them.
func (b *bells) listen(ctx context.Context, pools []string) bool {
	if len(b.subs) > 0 && slices.Equal(b.pools, pools) {
		return false
	}
	b.unsubscribe(ctx)
	for _, pool := range pools {
		sub, err := b.q.c.nc.ChanQueueSubscribe(bellSubject+pool, "workers", b.rung)
		if err != nil {
			b.q.c.log.WarnContext(ctx, "listen for jobs", "pool", pool, "err", err)
			continue
		}
		b.subs = append(b.subs, sub)
	}
	b.pools = pools
	return true
}

// bellBuffer is how many bells may ring between two looks; more need not be heard.
const bellBuffer = 64

func (b *bells) unsubscribe(ctx context.Context) {
	for _, sub := range b.subs {
		if err := sub.Unsubscribe(); err != nil && !b.q.c.nc.IsClosed() {
			b.q.c.log.WarnContext(ctx, "stop listening for jobs", "subject", sub.Subject, "err", err)
		}
	}
	b.subs = nil
}

func (b *bells) stop(ctx context.Context) {
	b.unsubscribe(ctx)
	for {
		select {
		case msg := <-b.rung:
			if err := b.q.c.nc.PublishMsg(&nats.Msg{Subject: msg.Subject, Header: msg.Header, Data: msg.Data}); err != nil {
				return
			}
		default:
			return
		}
	}
}
