package worker

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/worker/contain"
	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// job is one lease on its way to its end.
type job struct {
	w       *Worker
	lease   *broker.Lease
	spec    *broker.Job
	slot    *sandbox.Slot // nil once it is released
	space   *workspace    // nil before it is taken and once it is given back
	started time.Time
	begun   chan struct{} // closed when the operation is in the stage EXECUTING under this attempt
	outcome string        // for the metrics
	ran     bool          // whether the command has run
}

// do runs the job, settles it or gives it back, and leaves nothing.
func (j *job) do(ctx context.Context) {
	defer j.release()
	defer j.vacate(ctx) // after the client has its result: cleaning takes a while
	response, err := j.guarded(ctx)
	if err == nil {
		if j.ran {
			j.w.health.succeeded()
		}
		var o broker.Outcome
		if o, err = j.w.outcome(ctx, j.spec.Action.Space(), response); err == nil {
			j.settle(ctx, o)
			return
		}
	}
	j.vacate(ctx)
	j.fail(ctx, err)
}

// vacate gives the workspace back. A worker that can't clean it is out of order.
func (j *job) vacate(ctx context.Context) {
	if j.space == nil {
		return
	}
	ended := make(chan struct{})
	var g errgroup.Group
	g.Go(func() error { j.awaitEnd(ctx, ended); return nil })
	defer g.Wait() //nolint:errcheck // gives no errors
	defer close(ended)
	j.w.dirs.give(j.space)
	j.space = nil
}

// guarded runs the job under its lease: the job's context ends when the lease does.
func (j *job) guarded(outer context.Context) (response *repb.ExecuteResponse, err error) {
	ctx, cancel := context.WithCancelCause(outer)
	defer cancel(errFinished)
	ended := make(chan struct{})
	j.lease.Limit(j.w.limit(j.spec))
	var g errgroup.Group
	g.Go(func() error {
		cancel(contain.Panics(func() error {
			if err := j.lease.Begin(ctx); err != nil {
				return err
			}
			close(j.begun)
			return j.lease.Guard(ctx)
		})())
		j.awaitEnd(outer, ended)
		return nil
	})
	defer func() {
		// What the lease says goes before what it made of the job.
		if cause := context.Cause(ctx); cause != nil && err != nil && !errors.Is(err, cause) {
			err = errors.Join(cause, err)
		}
		close(ended)
		cancel(errFinished)
		err = errors.Join(err, g.Wait())
	}()
	err = contain.Panics(func() (err error) {
		response, err = j.run(ctx)
		return err
	})()
	return response, err
}

// awaitEnd waits for the end of a job that was told to end, or of its cleaning. When it does not come the worker is
// out of order.
func (j *job) awaitEnd(ctx context.Context, ended <-chan struct{}) {
	timer := time.NewTimer(j.w.cfg.Grace)
	defer timer.Stop()
	select {
	case <-ended:
		return
	case <-timer.C:
	}
	j.w.health.stuck(ctx, j.spec.Operation)
	<-ended
	j.w.health.unstuck()
}

// run returns what the client gets. Every error is the farm's.
func (j *job) run(ctx context.Context) (*repb.ExecuteResponse, error) {
	x := &execution{job: j, meta: &repb.ExecutedActionMetadata{Worker: j.w.cfg.Name}}
	err := x.fetch(ctx)
	select {
	case <-j.begun:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if result := j.earlier(ctx); result != nil {
		j.outcome = outcomeCached
		return &repb.ExecuteResponse{Result: result, CachedResult: true}, nil
	}
	var response *repb.ExecuteResponse
	if err == nil {
		response, err = x.execute(ctx)
	}
	if err != nil {
		if response = blame(err); response == nil {
			return nil, err
		}
		j.outcome = outcomeRejected
	}
	return response, nil
}

// earlier returns the result of an earlier attempt that got as far as the action cache.
func (j *job) earlier(ctx context.Context) *repb.ActionResult {
	if j.lease.Attempt() <= 1 || j.spec.SkipCacheLookup || j.spec.DoNotCache {
		return nil
	}
	result, err := j.w.cfg.Actions.Get(ctx, j.spec.Action)
	if err != nil {
		if !errors.Is(err, actioncache.ErrNotFound) {
			j.w.cfg.Log.WarnContext(ctx, "look for an earlier result", "operation", j.spec.Operation, "err", err)
		}
		return nil
	}
	return result
}

// fail ends a job that has no outcome of its own.
func (j *job) fail(ctx context.Context, err error) {
	log := j.w.cfg.Log.With("operation", j.spec.Operation, "attempt", j.lease.Attempt(), "err", err)
	giveBack := j.lease.Return
	switch {
	case errors.Is(err, broker.ErrLost), errors.Is(err, broker.ErrCancelled):
		j.drop(ctx)
		return
	case errors.Is(err, errDraining):
		log.InfoContext(ctx, "job interrupted by shutdown")
		giveBack = j.lease.HandOver
	case isOutage(err) && j.lease.Attempt() < maxOutages:
		log.WarnContext(ctx, "job waits for the storage")
		giveBack = j.lease.HandOver
		j.pause(ctx)
	default:
		log.WarnContext(ctx, "job failed and is returned")
		if isOwn(err) {
			j.w.health.failed(ctx, err)
		}
		j.pause(ctx)
	}
	j.outcome = outcomeReturned
	switch err := giveBack(ctx, reason(err)); {
	case errors.Is(err, broker.ErrExhausted):
		j.outcome = outcomeUnavailable
	case err != nil:
		log.WarnContext(ctx, "return job", "cause", err)
	}
	j.w.metrics.outcomes.WithLabelValues(j.outcome).Inc()
}

// maxOutages is up to which attempt one that ends because the storage does not answer is no failure. Such an
// outage hits all that runs, and is no sign of an action that must not be tried again; the pauses between
// so many attempts add up to about two minutes.
const maxOutages = 12

// isOutage tells whether a job failed because the storage or the broker does not answer.
func isOutage(err error) bool {
	return errors.Is(err, cas.ErrUnavailable) || errors.Is(err, broker.ErrUnavailable)
}

// pause keeps the slot for a moment after a failure of the farm, so that attempts are not used up and
// jobs not taken one after the other while the trouble lasts.
func (j *job) pause(ctx context.Context) {
	bound := time.Second << min(j.lease.Attempt(), 4)
	timer := time.NewTimer(bound/2 + rand.N(bound/2)) //nolint:gosec // spreads retries
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// drop ends a lease whose operation has gone on without it.
func (j *job) drop(ctx context.Context) {
	j.outcome = outcomeLost
	j.lease.Drop(ctx)
	j.w.metrics.outcomes.WithLabelValues(j.outcome).Inc()
}

func (j *job) settle(ctx context.Context, o broker.Outcome) {
	defer j.w.metrics.stage("settle")()
	err := j.lease.Settle(ctx, o)
	switch {
	case err == nil:
	case errors.Is(err, broker.ErrLost):
		j.outcome = outcomeLost
	default:
		j.w.cfg.Log.WarnContext(ctx, "settle job", "operation", j.spec.Operation, "attempt", j.lease.Attempt(), "err", err)
	}
	j.w.metrics.outcomes.WithLabelValues(j.outcome).Inc()
}

// release lets another job have the slot.
func (j *job) release() {
	if j.slot != nil {
		j.slot.Release()
		j.slot = nil
		j.w.metrics.busy.Dec()
	}
}
