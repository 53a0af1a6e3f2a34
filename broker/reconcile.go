package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
)

// What a process leaves undone when it dies between two steps is found by whoever comes next: a watcher
// on its heartbeat, a worker that gets the job, an equal request. The reconciler is for what nobody comes
// to. One process of the farm does it, every Config.Reconcile.
//
// It never looks through OPERATIONS, which holds the history of an hour. Every operation has a flight
// from before its record until after its end, so what was left undone is behind a flight that is older
// than its operation needs; and a job that the broker does not deliver any more is among those that were
// delivered once, which are not many more than the slots of the farm. What it does may be done twice
// and at the same time as anything else, so the lease that makes it one process is for economy alone.

const (
	leasesBucket = "leases"
	reconcileKey = "reconcile"
	// maxFlights bounds the flights that are looked at in one turn; the next one goes on there.
	maxFlights = 1000
	// maxDeliveries is after how many deliveries of a job the broker gives up. An operation has no more
	// than MaxAttempts, but a worker may die before it has begun one.
	maxDeliveries = 1000

	maxDeliveriesSubject = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES." + jobsStream + ".*"
)

// reconciler is the state of one process's turns.
type reconciler struct {
	c *Client
	// flight is where the next turn goes on.
	flight uint64
	// stuck are the jobs that the last turn suspected, with the revisions of their operations.
	stuck map[uint64]uint64
}

// reconcile takes turns until ctx ends.
func (c *Client) reconcile(ctx context.Context) error {
	r := &reconciler{c: c}
	timer := time.NewTimer(rand.N(c.reconciles)) //nolint:gosec // spreads the processes of a farm
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		timer.Reset(c.reconciles)
		if !c.leads(ctx) {
			*r = reconciler{c: c}
			continue
		}
		if err := errors.Join(r.queues(ctx), r.flights(ctx)); err != nil && ctx.Err() == nil {
			c.log.WarnContext(ctx, "look for what was left undone", "err", err)
		}
	}
}

// leads takes or keeps the lease.
func (c *Client) leads(ctx context.Context) bool {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	if c.leading > 0 {
		if revision, err := c.leases.Update(ctx, reconcileKey, []byte(c.id), c.leading); err == nil {
			c.leading = revision
			return true
		}
	}
	var err error
	c.leading, err = c.leases.Create(ctx, reconcileKey, []byte(c.id))
	return err == nil
}

// queues makes every pool's consumers, and looks for jobs that were delivered and are not any more.
func (r *reconciler) queues(ctx context.Context) error {
	var errs []error
	suspects := map[uint64]uint64{}
	for _, pool := range r.c.view.poolNames() {
		for lane := range lanes {
			asking, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
			consumer, err := r.c.jobs.Consumer(asking, consumerName(pool, lane))
			if errors.Is(err, jetstream.ErrConsumerNotFound) {
				r.c.log.WarnContext(ctx, "the consumer of a lane is gone and is made again", "pool", pool, "lane", lane)
				r.c.metrics.mended.WithLabelValues(mendedConsumer).Inc()
				err = r.c.ensureConsumers(asking, pool)
			} else if err == nil {
				err = r.delivered(ctx, consumer.CachedInfo(), suspects)
			}
			cancel()
			errs = append(errs, err)
		}
	}
	r.stuck = suspects
	return errors.Join(errs...)
}

// delivered looks at the jobs that a consumer has delivered and that are still there. Those that wait
// for an acknowledgement, or for the time until they are delivered again, count as pending; when there
// are more, the broker has given some up.
func (r *reconciler) delivered(ctx context.Context, info *jetstream.ConsumerInfo, suspects map[uint64]uint64) error {
	var idle []idleJob
	n := 0
	for sequence := uint64(1); ; n++ {
		msg, err := r.c.following(ctx, r.c.jobs, sequence, info.Config.FilterSubject)
		if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && msg.Sequence > info.Delivered.Stream {
			break
		}
		if err != nil {
			return err
		}
		sequence = msg.Sequence + 1
		if revision := r.c.idleJob(ctx, msg); revision > 0 {
			idle = append(idle, idleJob{msg.Sequence, revision})
		}
	}
	if n <= info.NumAckPending {
		return nil
	}
	for _, j := range idle {
		if revision, before := r.stuck[j.sequence]; before && revision == j.revision {
			if err := r.c.unstick(ctx, j.sequence); err != nil {
				return err
			}
			continue
		}
		suspects[j.sequence] = j.revision
	}
	return nil
}

// idleJob is a job that nobody works on, and the revision of its operation.
type idleJob struct{ sequence, revision uint64 }

// idleJob removes a job whose operation has ended, and returns the revision of one whose operation does
// not run, else 0.
func (c *Client) idleJob(ctx context.Context, msg *jetstream.RawStreamMsg) (revision uint64) {
	operation := operationOf(msg.Subject)
	now, revision, err := c.read(ctx, operation)
	switch {
	case err == nil && now.done(), errors.Is(err, ErrNotFound) && time.Since(msg.Time) > flightGrace:
		c.log.InfoContext(ctx, "job of an ended operation removed", "operation", operation)
		c.removeJob(ctx, msg.Sequence)
		c.metrics.mended.WithLabelValues(mendedLeft).Inc()
	case err == nil && (now.Stage != repb.ExecutionStage_EXECUTING || !c.view.lives(now.Worker)):
		return revision
	}
	return 0
}

// unstick queues an operation again whose job the broker does not deliver any more.
func (c *Client) unstick(ctx context.Context, sequence uint64) error {
	msg, err := c.following(ctx, c.jobs, sequence, jobSubject+"*.*.*")
	if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && msg.Sequence != sequence {
		return nil
	}
	if err != nil {
		return err
	}
	r, revision, err := c.read(ctx, operationOf(msg.Subject))
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	c.log.WarnContext(ctx, "job that was not delivered any more is queued again", "operation", operationOf(msg.Subject))
	c.metrics.mended.WithLabelValues(mendedStuck).Inc()
	c.removeJob(ctx, sequence)
	if err != nil || r.done() {
		return nil //nolint:nilerr // nothing is left to run
	}
	r.Revision = revision
	return c.publishJob(ctx, r)
}

// removeJob removes a message of the queue, also one that a worker has.
func (c *Client) removeJob(ctx context.Context, sequence uint64) {
	if err := c.deleteJob(ctx, sequence); err != nil {
		c.log.WarnContext(ctx, "remove job", "sequence", sequence, "err", err)
	}
}

func (c *Client) deleteJob(ctx context.Context, sequence uint64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	if err := c.jobs.DeleteMsg(ctx, sequence); err != nil && !isGone(err) {
		return unavailable(cause(ctx, err))
	}
	return nil
}

// flights looks at flights that are old enough to have left something undone.
func (r *reconciler) flights(ctx context.Context) error {
	for range maxFlights {
		msg, err := r.c.following(ctx, r.c.flights, r.flight+1, flightSubject+"*.*")
		if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && time.Since(msg.Time) < r.c.mendAfter {
			r.flight = 0 // what comes after is younger
			return nil
		}
		if err != nil {
			return err
		}
		if err := r.c.landed(ctx, string(msg.Data), msg); err != nil {
			return err
		}
		r.flight = msg.Sequence
	}
	return nil
}

// landed mends what an operation whose flight is still there lacks.
func (c *Client) landed(ctx context.Context, operation string, flight *jetstream.RawStreamMsg) error {
	r, stored, err := c.stored(ctx, operation)
	switch {
	case errors.Is(err, ErrNotFound) && time.Since(flight.Time) > flightGrace, err == nil && r.done():
		if r != nil {
			c.removeLeft(ctx, r)
		} else if err := c.endUnrecorded(ctx, operation, flight.Time); err != nil {
			return err
		}
		c.metrics.mended.WithLabelValues(mendedFlight).Inc()
		c.releaseFlight(ctx, &record{Operation: operation, Flight: flight.Sequence})
		return nil
	case errors.Is(err, ErrNotFound):
		return nil
	case errors.Is(err, ErrUnavailable):
		return err
	case err != nil:
		return c.endUnreadable(ctx, operation)
	case c.overdue(ctx, r):
		return c.takeFromWorker(ctx, r)
	}
	for _, at := range []struct { // in the order in which a job moves
		stream  jetstream.Stream
		subject string
	}{{c.held, heldSubjectOf(r)}, {c.jobs, jobSubjectOf(r)}} {
		if _, err = c.last(ctx, at.stream, at.subject); !errors.Is(err, jetstream.ErrMsgNotFound) {
			return err
		}
	}
	op, err := r.snapshot(stored.Sequence)
	if err != nil {
		return c.endUnreadable(ctx, operation)
	}
	c.metrics.mended.WithLabelValues(mendedJob).Inc()
	c.mend(ctx, op)
	return nil
}

// removeLeft removes the job of an operation that has ended.
func (c *Client) removeLeft(ctx context.Context, r *record) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	err := errors.Join(
		c.jobs.Purge(ctx, jetstream.WithPurgeSubject(jobSubjectOf(r))),
		c.held.Purge(ctx, jetstream.WithPurgeSubject(heldSubjectOf(r))),
	)
	if err != nil {
		c.log.WarnContext(ctx, "remove job of an ended operation", "operation", r.Operation, "err", err)
	}
}

// endUnrecorded takes the place of a record that was not stored: one that comes late would never end.
func (c *Client) endUnrecorded(ctx context.Context, operation string, began time.Time) error {
	if !validName(operation) {
		return nil
	}
	r := &record{Operation: operation, Queued: began, Pool: defaultPool}
	r.finish(code.Code_UNAVAILABLE, "the operation could not be queued; try again")
	_, err := c.write(ctx, r, 0)
	return err // when it has come meanwhile, the next turn finds it
}

// endUnreadable ends an operation whose record no process of this version can read.
func (c *Client) endUnreadable(ctx context.Context, operation string) error {
	msg, err := c.last(ctx, c.operations, operationSubject+operation)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	r := &record{Operation: operation, Queued: msg.Time, Pool: defaultPool}
	r.finish(code.Code_INTERNAL, "the operation's record could not be read; execute the action again")
	_, err = c.write(ctx, r, msg.Sequence)
	if errors.Is(err, errConflict) {
		return nil // whoever was first can read it
	}
	return err
}

// removeUnreadable ends what hangs on a job that cannot be read: the job goes, and comes back from the
// operation's record if that is better.
func (c *Client) removeUnreadable(ctx context.Context, subject, ack string) error {
	operation := operationOf(subject)
	r, revision, err := c.read(ctx, operation)
	if err == nil {
		_, err = r.Action.digest()
	}
	if errors.Is(err, ErrUnavailable) {
		return err // it is delivered again
	}
	// Until it is gone a second one is refused.
	asking, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	if _, err := c.nc.RequestWithContext(asking, ack, []byte(ackTerminate)); err != nil {
		return unavailable(cause(asking, err))
	}
	switch {
	case errors.Is(err, ErrNotFound), err == nil && r.done():
		return nil
	case err != nil:
		return c.endUnreadable(ctx, operation)
	}
	r.Revision = revision
	return c.publishJob(ctx, r)
}

// hearAdvisories ends the operations whose jobs the broker gives up, until ctx ends. What no process
// hears is found by the reconciler.
func (c *Client) hearAdvisories(ctx context.Context) error {
	advisories := make(chan *nats.Msg, bellBuffer)
	sub, err := c.nc.ChanQueueSubscribe(maxDeliveriesSubject, "jetfarm", advisories)
	if err != nil {
		return unavailable(err)
	}
	defer sub.Unsubscribe() //nolint:errcheck // of a connection that is closed nothing is left
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-advisories:
			var advisory struct {
				Sequence   uint64 `json:"stream_seq"`
				Deliveries int    `json:"deliveries"`
			}
			err := json.Unmarshal(m.Data, &advisory)
			if err == nil {
				err = c.giveUpJob(ctx, advisory.Sequence, advisory.Deliveries)
			}
			if err != nil && ctx.Err() == nil {
				c.log.WarnContext(ctx, "end operation whose job is not delivered any more", "err", err)
			}
		}
	}
}

// giveUpJob ends the operation of a job that was delivered too often.
func (c *Client) giveUpJob(ctx context.Context, sequence uint64, deliveries int) error {
	msg, err := c.following(ctx, c.jobs, sequence, jobSubject+"*.*.*")
	if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && msg.Sequence != sequence {
		return nil
	}
	if err != nil {
		return err
	}
	r, _, err := c.read(ctx, operationOf(msg.Subject))
	if err == nil && !r.done() {
		err = c.bury(ctx, r, fmt.Sprintf("%d workers were given the action and none finished it, so it is set aside", deliveries))
	}
	if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrLost) {
		return err
	}
	if r, _, err = c.read(ctx, operationOf(msg.Subject)); err == nil && r.done() || errors.Is(err, ErrNotFound) {
		c.removeJob(ctx, sequence)
	}
	return nil
}

// operationOf is the operation of a job's subject.
func operationOf(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }
