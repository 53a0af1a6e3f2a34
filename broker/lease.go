package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Job is what a worker is asked to run.
type Job struct {
	Operation string
	Action    digest.Digest
	// ActionData is the serialized Action, or empty.
	ActionData      []byte
	SkipCacheLookup bool
	DoNotCache      bool
	Queued          time.Time
	Priority        int32
	// Metadata is the client's, or nil.
	Metadata *repb.RequestMetadata
}

// Lease is the right of one worker to run one job, for as long as the worker's Queue renews it. It
// ends with Settle or Return, or when Begin reports ErrLost. An acknowledgement is not a fence (the
// broker accepts one of a lease that has passed on), so what a lease writes is fenced by its attempt.
type Lease struct {
	q       *Queue
	record  *record // as of the job; Begin replaces it
	ack     string  // the subject that settles the message
	first   bool    // whether this is the first delivery
	limit   time.Duration
	begun   uint64 // the revision that Begin wrote
	watcher *watcher
	over    atomic.Bool // whether it is renewed no more
}

// Job returns what to run.
func (l *Lease) Job() *Job {
	r := l.record
	action, _ := r.Action.digest() //nolint:errcheck // checked when the lease was made
	job := &Job{
		Operation: r.Operation, Action: action, ActionData: r.ActionData, SkipCacheLookup: r.SkipCacheLookup, DoNotCache: r.DoNotCache,
		Queued: r.Queued, Priority: r.Priority,
	}
	if metadata := new(repb.RequestMetadata); len(r.Metadata) > 0 && proto.Unmarshal(r.Metadata, metadata) == nil {
		job.Metadata = metadata
	}
	return job
}

// Attempt counts the workers that have begun this operation, this one included. It is 0 before Begin.
func (l *Lease) Attempt() int {
	if l.begun == 0 {
		return 0
	}
	return l.record.Attempt
}

// Tries is Attempt without the attempts that ended through no fault of the action or its worker, as
// when a worker is shut down.
func (l *Lease) Tries() int { return len(l.record.Failures) + 1 }

// Limit says how long the attempt may take at most, and is called before Begin. What takes longer is taken
// from the worker, which counts as a failure of it. Without a limit a worker that hangs and goes on
// renewing its leases keeps the operation.
func (l *Lease) Limit(d time.Duration) { l.limit = d }

// Begin puts the operation into the stage EXECUTING under a new attempt, which ends every earlier
// one. ErrLost says that there is nothing to run, since the operation has ended, or ends now because too
// many workers have died with it; the lease is over then. After an error it is not renewed any more.
func (l *Lease) Begin(ctx context.Context) (err error) {
	defer func() { l.over.Store(err != nil) }()
	w, err := l.q.c.watcher(l.record.Operation, "")
	if err != nil {
		return err
	}
	r, revision, err := l.begin(ctx)
	if err != nil {
		w.stop(ctx)
		if errors.Is(err, errExhausted) {
			err = l.q.c.buryExhausted(ctx, r)
		}
		if err == nil || errors.Is(err, ErrLost) || errors.Is(err, ErrNotFound) {
			l.acknowledge(ctx)
			return fmt.Errorf("%w: operation %s is already done or was deleted", ErrLost, l.record.Operation)
		}
		return err
	}
	w.silent = true
	l.record, l.begun, l.watcher = r, revision, w
	return nil
}

func (l *Lease) begin(ctx context.Context) (*record, uint64, error) {
	tried := 0
	change := func(r *record) error {
		switch {
		case r.done():
			return ErrLost
		case tried > 0 && r.Attempt == tried && r.Worker == l.q.self.Name:
			return errUnchanged // an earlier try whose answer was lost
		}
		if r.lose(); r.exhausted() {
			return errExhausted
		}
		tried = r.Attempt + 1
		r.Attempt, r.Worker, r.Stage, r.Note, r.Revision = r.Attempt+1, l.q.self.Name, repb.ExecutionStage_EXECUTING, "", 0
		r.Limit, r.Began, r.ActionData = l.limit, time.Time{}, nil // the job still has the action
		return nil
	}
	if l.first {
		// The job carries the record as it was created, and so far nobody else had a reason to change it.
		r := *l.record
		if err := change(&r); err != nil {
			return nil, 0, err
		}
		revision, err := l.q.c.write(ctx, &r, l.record.Revision)
		if err == nil || !errors.Is(err, errConflict) && !errors.Is(err, ErrUnavailable) {
			return &r, revision, err
		}
	}
	r, revision, err := l.q.c.update(ctx, l.record.Operation, change)
	if errors.Is(err, errUnchanged) {
		err = nil
	}
	return r, revision, err
}

// Guard blocks until ctx ends, whose cause it returns, or the lease is over: ErrCancelled when the
// operation was cancelled, which Guard itself does when nobody has watched it for a while, ErrLost when
// another attempt began or ended it, or it was taken from this worker. A lease that is over is not renewed
// any more. Guard follows Begin and must have returned before Settle or Return is called.
func (l *Lease) Guard(ctx context.Context) (err error) {
	defer func() { l.over.Store(errors.Is(err, ErrLost) || errors.Is(err, ErrCancelled)) }()
	op := &Operation{Name: l.record.Operation, Revision: l.begun}
	var deserted time.Time
	for {
		last := op.Revision
		op, err = l.watcher.next(ctx, op)
		if err == nil && op.Revision == last { // a heartbeat
			deserted = l.deserted(ctx, deserted)
			if !deserted.IsZero() && time.Since(deserted) >= l.q.c.abandoned {
				// When this fails the next heartbeat does it; when not, the end arrives like any other.
				l.q.c.endAbandoned(ctx, op.Name)
			}
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrNotFound):
			return fmt.Errorf("%w: the operation was deleted", ErrLost)
		case err != nil:
			return err
		case op.Done() && statusOf(op) == code.Code_CANCELLED:
			return ErrCancelled
		case op.Done() || op.Attempt != l.record.Attempt:
			return fmt.Errorf("%w: attempt %d on %s took over", ErrLost, op.Attempt, op.Worker)
		case op.Stage != repb.ExecutionStage_EXECUTING:
			return fmt.Errorf("%w: %s", ErrLost, op.Note)
		}
	}
}

func statusOf(op *Operation) code.Code {
	response := new(repb.ExecuteResponse)
	if err := proto.Unmarshal(op.Response, response); err != nil {
		return code.Code_UNKNOWN
	}
	return code.Code(response.GetStatus().GetCode())
}

// Outcome is the end of an operation: a serialized ExecuteResponse of at most MaxResponse bytes, or
// the blob that holds it.
type Outcome struct {
	Response     []byte
	ResponseBlob digest.Digest
}

// Settle ends the operation: it writes the terminal state, lets equal actions run by themselves
// again, and removes the job. The blobs of the outcome must be durable and the action cache written
// before. ErrLost says that another attempt, or a cancel, was first, and that this outcome was
// dropped. After any other error the job is delivered again.
func (l *Lease) Settle(ctx context.Context, o Outcome) error {
	defer l.end(ctx)
	if len(o.Response) > MaxResponse {
		return fmt.Errorf("%w: a response of %d bytes is larger than %d and belongs into a blob", ErrInvalid, len(o.Response), MaxResponse)
	}
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	err := l.settle(ctx, o)
	switch {
	case errors.Is(err, ErrLost), errors.Is(err, ErrNotFound):
		// Whoever was first removes the job, too.
		return fmt.Errorf("%w: operation %s", ErrLost, l.record.Operation)
	case err != nil:
		return err
	}
	l.q.c.releaseFlight(ctx, l.record)
	l.acknowledge(ctx)
	return nil
}

func (l *Lease) settle(ctx context.Context, o Outcome) error {
	finish := func(r *record) {
		r.Stage, r.response, r.ResponseBlob, r.Note = repb.ExecutionStage_COMPLETED, o.Response, refOf(o.ResponseBlob), ""
	}
	r := *l.record
	finish(&r)
	_, err := l.q.c.write(ctx, &r, l.begun)
	if !errors.Is(err, errConflict) && !errors.Is(err, ErrUnavailable) {
		return err
	}
	_, _, err = l.q.c.update(ctx, l.record.Operation, func(r *record) error {
		switch {
		case r.done() && r.Attempt == l.record.Attempt && r.Worker == l.q.self.Name && bytes.Equal(r.response, o.Response):
			return errUnchanged // an earlier try whose answer was lost
		case r.done() || r.Attempt != l.record.Attempt || r.Stage != repb.ExecutionStage_EXECUTING:
			return ErrLost
		}
		finish(r)
		return nil
	})
	if errors.Is(err, errUnchanged) {
		return nil
	}
	return err
}

// Return gives the job back after a failure of the farm: the operation goes to the stage QUEUED with
// a note, and the job to another worker after a moment. reason says why in a few words that a user
// may read. When it was the last of MaxAttempts the operation ends instead, which ErrExhausted says.
func (l *Lease) Return(ctx context.Context, reason string) error {
	return l.giveUp(ctx, reason, true)
}

// HandOver is Return for a worker that is shut down: it does not count as one of the Tries.
func (l *Lease) HandOver(ctx context.Context, reason string) error {
	return l.giveUp(ctx, reason, false)
}

// Drop ends a lease that Guard has reported as over. The job belongs to whoever took it over.
func (l *Lease) Drop(ctx context.Context) { l.end(ctx) }

func (l *Lease) giveUp(ctx context.Context, reason string, failed bool) error {
	defer l.end(ctx)
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	attempt := l.record.Attempt
	r, _, err := l.q.c.update(ctx, l.record.Operation, func(r *record) error {
		if r.done() || r.Attempt != attempt || l.begun == 0 || r.Stage != repb.ExecutionStage_EXECUTING {
			return errUnchanged
		}
		if failed {
			r.fail(l.q.self.Name, reason, time.Now())
		}
		if r.exhausted() {
			return errExhausted
		}
		r.Stage, r.Worker, r.Note = repb.ExecutionStage_QUEUED, "", reason
		return nil
	})
	if errors.Is(err, errExhausted) {
		if err = l.q.c.buryExhausted(ctx, r); err == nil {
			l.acknowledge(ctx)
			return ErrExhausted
		}
		if errors.Is(err, ErrLost) {
			err = errUnchanged
		}
	}
	l.q.c.nakAfter(ctx, l.ack, returnDelay)
	if errors.Is(err, errUnchanged) || errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// returnDelay keeps a job that was given back from the worker that gave it, mostly.
const returnDelay = 200 * time.Millisecond

// giveBack returns a job that was never begun.
func (l *Lease) giveBack(ctx context.Context) {
	l.end(ctx)
	l.q.c.nakAfter(ctx, l.ack, returnDelay)
}

// nakAfter makes the broker deliver a job again in a moment. When that fails it does so after AckWait.
func (c *Client) nakAfter(ctx context.Context, ack string, delay time.Duration) {
	if err := c.nc.Publish(ack, fmt.Appendf(nil, `-NAK {"delay":%d}`, delay.Nanoseconds())); err != nil {
		c.log.WarnContext(ctx, "return job", "err", err)
	}
}

// end stops renewing and watching.
func (l *Lease) end(ctx context.Context) {
	l.q.forget(l)
	if l.watcher != nil {
		l.watcher.stop(ctx)
		l.watcher = nil
	}
}

// acknowledge removes the job and waits for the broker to confirm it. When that fails the job comes
// back, and Begin finds the operation done.
func (l *Lease) acknowledge(ctx context.Context) {
	l.end(ctx)
	ctx, cancel := detach(ctx, requestTimeout)
	defer cancel()
	if _, err := l.q.c.nc.RequestWithContext(ctx, l.ack, []byte(ackDone)); err != nil {
		l.q.c.log.WarnContext(ctx, "acknowledge job", "operation", l.record.Operation, "err", err)
	}
}
