package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
)

// A worker whose process lives renews its leases, whatever has become of the action: it may wait for a file
// system that does not answer, or have a bug. Only the worker knows how long each of its steps may take, so
// it writes the sum into the record when it begins, and the reconciler takes from it what takes longer.

// overdue tells whether an attempt should have ended by now. Both times are the broker's: the clock of a
// worker, or of this process, may be wrong by more than an action takes.
func (c *Client) overdue(ctx context.Context, r *record) bool {
	began := r.began()
	if r.Stage != repb.ExecutionStage_EXECUTING || r.Limit <= 0 || time.Since(began) <= r.Limit {
		return false
	}
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	info, err := c.operations.Info(ctx)
	return err == nil && info.TimeStamp.Sub(began) > r.Limit
}

// began is when an attempt began, by the broker's clock.
func (r *record) began() time.Time {
	if r.Began.IsZero() {
		return r.stored
	}
	return r.Began
}

// takeFromWorker ends the attempt in r as a failure of its worker and queues the operation anew. The job
// goes first: one that the worker has and renews would keep the new one out, and when this process dies in
// between, an operation that runs without a job is found to be one. Who begins it then takes it over.
func (c *Client) takeFromWorker(ctx context.Context, r *record) error {
	attempt, worker := r.Attempt, r.Worker
	var action []byte
	msg, err := c.last(ctx, c.jobs, jobSubjectOf(r))
	switch {
	case err == nil:
		if job, err := decodeRecord(msg.Data); err == nil {
			action = job.ActionData
		}
		if err := c.deleteJob(ctx, msg.Sequence); err != nil {
			return err
		}
	case !errors.Is(err, jetstream.ErrMsgNotFound):
		return err
	}
	r, revision, err := c.update(ctx, r.Operation, func(r *record) error {
		if r.done() || r.Attempt != attempt || r.Stage != repb.ExecutionStage_EXECUTING {
			return errUnchanged
		}
		reason := fmt.Sprintf("the attempt did not end within %v, so it was taken from the worker", r.Limit)
		if r.fail(worker, reason, time.Now()); r.exhausted() {
			return errExhausted
		}
		r.Stage, r.Worker, r.Note = repb.ExecutionStage_QUEUED, "", worker+": "+reason
		return nil
	})
	switch {
	case errors.Is(err, ErrNotFound):
		return nil
	case errors.Is(err, errUnchanged):
		if r.Stage != repb.ExecutionStage_QUEUED {
			return nil // it has ended, or another one runs it
		}
	case errors.Is(err, errExhausted):
		if err = c.buryExhausted(ctx, r); errors.Is(err, ErrLost) {
			return nil
		}
	}
	if err != nil && !errors.Is(err, errUnchanged) {
		return err
	}
	c.log.WarnContext(ctx, "an attempt that did not end in time is taken from its worker", "operation", r.Operation, "worker", worker, "attempt", attempt)
	c.metrics.mended.WithLabelValues(mendedHung).Inc()
	if r.exhausted() {
		return nil
	}
	r.Revision, r.ActionData = revision, action
	return c.publishJob(ctx, r)
}
