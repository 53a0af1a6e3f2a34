package broker

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Request is an action to execute.
type Request struct {
	Action   digest.Digest
	Platform Platform
	// Priority is REAPI's: a lower one runs sooner.
	Priority        int32
	SkipCacheLookup bool
	// ActionData is the serialized Action, which spares the worker to read it; it may be empty.
	ActionData []byte
	// DoNotCache keeps the request from joining an equal one.
	DoNotCache bool
	Metadata   *repb.RequestMetadata
	// Unattended keeps the operation from being cancelled while nobody watches it.
	Unattended bool
	// Confirm is called when this request has become the one in flight for its action and before
	// anything is queued; its error ends Submit, which returns it as it is. It is the place to look
	// into the action cache again: an equal action may have ended since the first look.
	Confirm func(context.Context) error
}

// maxActionData bounds the action that travels with its operation; a larger one is read by the worker.
const maxActionData = 4 << 10

// maxMetadata bounds the client's metadata that travels with an operation.
const maxMetadata = 8 << 10

// maxInvocation bounds the invocation id that is kept for listings.
const maxInvocation = 128

// flightGrace is how long a flight without a record is taken for one that is just being made.
const flightGrace = 10 * time.Second

// Submit queues an action and returns the name of its operation, or of an equal one in flight, which
// runs for both. By this name nobody cancels for himself alone. Once it returns a name, the operation ends in
// a terminal state whatever happens to this process. The error wraps ErrInvalid, ErrNoWorker, ErrTooManyPools, ErrQueueFull or
// ErrUnavailable, or is Confirm's.
func (c *Client) Submit(ctx context.Context, r Request) (operation string, err error) {
	rec := newRecord(&r)
	joined, err := c.claim(ctx, rec, &r)
	if err != nil || joined != "" {
		return joined, err
	}
	_, err = c.enqueue(ctx, rec)
	return rec.Operation, err
}

// Execute is Submit and then Watch under the name of a new waiter, without the read of a record that this
// client has just written.
func (c *Client) Execute(ctx context.Context, r Request) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		rec := newRecord(&r)
		rec.Waiters = []string{newWaiter()}
		joined, err := c.claim(ctx, rec, &r)
		if err == nil && joined != "" {
			c.watch(ctx, joined, rec.Waiters[0], yield)
			return
		}
		if err != nil {
			yield(nil, err)
			return
		}
		w, err := c.watcher(rec.Operation, rec.Waiters[0])
		if err != nil {
			c.releaseFlight(ctx, rec)
			yield(nil, err)
			return
		}
		defer w.stop(ctx)
		op, err := c.enqueue(ctx, rec)
		w.follow(ctx, op, err, yield)
	}
}

// claim does what comes before an operation is recorded: rec becomes the one in flight for its action,
// or joined names the one that is.
func (c *Client) claim(ctx context.Context, rec *record, r *Request) (joined string, err error) {
	to := c.view.route(r.Platform)
	if to.refused != nil && c.patienceFor(to) == 0 {
		return "", to.refused
	}
	rec.Pool = to.poolName()
	if err := c.ensurePool(ctx, rec.Pool, to.pool); err != nil {
		return "", err
	}
	if joined, err := c.claimFlight(ctx, rec); err != nil || joined != "" {
		return joined, err
	}
	if r.Confirm != nil {
		if err := r.Confirm(ctx); err != nil {
			c.releaseFlight(ctx, rec)
			return "", err
		}
	}
	return "", nil
}

func newRecord(r *Request) *record {
	metadata, err := proto.Marshal(r.Metadata)
	if err != nil || len(metadata) > maxMetadata {
		metadata = nil
	}
	action := r.ActionData
	if len(action) > maxActionData {
		action = nil
	}
	now := time.Now().UTC()
	return &record{
		Operation: newName(), Action: refOf(r.Action), ActionData: action, Stage: repb.ExecutionStage_QUEUED,
		Queued: now, Updated: now, Platform: r.Platform,
		Priority: r.Priority, SkipCacheLookup: r.SkipCacheLookup, DoNotCache: r.DoNotCache, Unattended: r.Unattended,
		Metadata: metadata, Invocation: fmt.Sprintf("%.*s", maxInvocation, r.Metadata.GetToolInvocationId()),
	}
}

// enqueue writes the record and then the job, and finishes although ctx ends. A job without a record
// would run for nobody. When it fails the flight is released.
func (c *Client) enqueue(ctx context.Context, rec *record) (*Operation, error) {
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	queue := c.queueOf(rec)
	revision, err := c.create(ctx, rec)
	if err == nil {
		job := *rec
		job.Revision = revision
		if err = queue(ctx, &job); err == nil {
			return rec.snapshotFor(rec.waiter(), revision)
		}
	}
	ended, err := c.abandon(ctx, rec, err)
	c.holds.forget(rec)
	if ended { // else the flight leads the reconciler to what is left
		c.releaseFlight(ctx, rec)
	}
	return nil, err
}

// abandon ends an operation that could not be recorded or queued because of err, which it returns, and tells
// whether it has: an answer that was lost may be of a record that is stored.
func (c *Client) abandon(ctx context.Context, rec *record, err error) (ended bool, _ error) {
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	finish := func(r *record) error {
		switch {
		case r.done():
			return errUnchanged
		case errors.Is(err, ErrQueueFull):
			r.finish(code.Code_RESOURCE_EXHAUSTED, "the queue is full; try again later")
		default:
			r.finish(code.Code_UNAVAILABLE, "the operation could not be queued; try again")
		}
		return nil
	}
	// A record that is stored late finds its place taken. Whoever joined the flight must see an end, too.
	last := *rec
	end := finish(&last)
	if end == nil {
		_, end = c.write(ctx, &last, 0)
	}
	if errors.Is(end, errConflict) {
		_, _, end = c.update(ctx, rec.Operation, finish)
	}
	if end == nil || errors.Is(end, errUnchanged) {
		return true, err
	}
	return false, errors.Join(err, end)
}

// create stores a new record. A second try that finds the first one stored is success.
func (c *Client) create(ctx context.Context, rec *record) (uint64, error) {
	for attempt := 0; ; attempt++ {
		revision, err := c.write(ctx, rec, 0)
		if errors.Is(err, errConflict) {
			_, revision, err = c.read(ctx, rec.Operation)
		}
		if err == nil || !errors.Is(err, ErrUnavailable) || attempt >= maxTries {
			return revision, err
		}
		if err := pause(ctx, attempt); err != nil {
			return 0, err
		}
	}
}

// publishJob puts a job into the queue and rings for a worker. The queue holds one message per
// operation, so repeating it is harmless.
func (c *Client) publishJob(ctx context.Context, job *record) error {
	payload, err := job.encode()
	if err != nil {
		return err
	}
	sequence, err := c.publishOnce(ctx, jobSubjectOf(job), payload)
	if err != nil {
		return err
	}
	c.holds.noteStored(job, sequence)
	if sequence > 0 {
		c.ring(ctx, job)
	}
	return nil
}

// publishOnce stores a message whose subject may have one only. The sequence is 0 when there is one.
func (c *Client) publishOnce(ctx context.Context, subject string, payload []byte) (sequence uint64, err error) {
	for attempt := 0; ; attempt++ {
		sequence, err := c.publish(ctx, &nats.Msg{Subject: subject, Data: payload})
		switch {
		case err == nil:
			return sequence, nil
		case errors.Is(err, errStoreFailed) && strings.Contains(err.Error(), "per subject"):
			return 0, nil
		case errors.Is(err, errStoreFailed):
			return 0, fmt.Errorf("%w: %d operations wait", ErrQueueFull, c.maxQueued)
		case !errors.Is(err, ErrUnavailable) || attempt >= maxTries:
			return 0, err
		}
		if err := pause(ctx, attempt); err != nil {
			return 0, err
		}
	}
}

// ring wakes an idle worker. Without it, one finds the job on its patrol.
func (c *Client) ring(ctx context.Context, job *record) {
	if err := c.nc.Publish(bellSubject+job.Pool, []byte(consumerName(job.Pool, job.Lane))); err != nil {
		c.log.WarnContext(ctx, "ring for a worker", "pool", job.Pool, "err", err)
	}
}

// mend repairs an operation that has lost its job: its submitter died between record and job, or the
// broker lost the end of the queue in a power cut. It publishes the job again, which changes nothing
// when there is one. A watcher calls it on its heartbeat.
func (c *Client) mend(ctx context.Context, op *Operation) {
	if op.Done() || time.Since(op.Updated) < c.mendAfter {
		return
	}
	r, revision, err := c.read(ctx, op.Name)
	if err != nil || r.done() {
		return
	}
	c.checkPool(ctx, r)
	if c.holds.isHeld(r.Operation) {
		return
	}
	if held, err := c.last(ctx, c.held, heldSubjectOf(r)); err == nil {
		if c.submits {
			c.adoptOne(ctx, held)
		}
		return
	} else if !errors.Is(err, jetstream.ErrMsgNotFound) {
		return
	}
	r.Revision = revision
	if err := c.publishJob(ctx, r); err != nil {
		c.log.WarnContext(ctx, "queue operation again", "operation", op.Name, "err", err)
	}
}

// flightOf is the subject under which equal requests meet: those of one action that treat the
// action cache alike. An operation that none may join has a flight of its own, by which the reconciler
// finds it.
func flightOf(r *record) string {
	if r.DoNotCache {
		return flightSubject + r.Action.Space + "." + r.Operation
	}
	lookup := "lookup"
	if r.SkipCacheLookup {
		lookup = "skip"
	}
	return flightSubject + r.Action.Space + "." + r.Action.Hash + "-" + strconv.FormatInt(r.Action.Size, 10) + "-" + lookup
}

// claimFlight makes rec's operation the one in flight for its action, or returns the name of the
// one that already is. A flight whose operation has ended, or was never recorded, is taken over.
func (c *Client) claimFlight(ctx context.Context, rec *record) (joined string, err error) {
	subject := flightOf(rec)
	var expected uint64
	for attempt := 0; ; attempt++ {
		msg := &nats.Msg{Subject: subject, Data: []byte(rec.Operation)}
		sequence, err := c.publish(ctx, msg, jetstream.WithExpectLastSequencePerSubject(expected))
		if err == nil {
			rec.Flight = sequence
			return "", nil
		}
		if !errors.Is(err, errConflict) && !errors.Is(err, ErrUnavailable) || attempt >= maxFlightTries {
			return "", unavailable(err)
		}
		other, err := c.last(ctx, c.flights, subject)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			expected = 0
		case err != nil:
			return "", err
		case string(other.Data) == rec.Operation: // an earlier try whose answer was lost
			rec.Flight = other.Sequence
			return "", nil
		default:
			joined, over, err := c.joinFlight(ctx, rec, other)
			if err != nil || joined != "" {
				return joined, err
			}
			if expected = 0; over {
				expected = other.Sequence
				continue
			}
		}
		if err := pause(ctx, attempt); err != nil {
			return "", err
		}
	}
}

// joinFlight makes rec's waiter one of the operation that is in flight, and returns its name; or tells that the
// flight is over.
func (c *Client) joinFlight(ctx context.Context, rec *record, flight *jetstream.RawStreamMsg) (joined string, over bool, err error) {
	r, revision, err := c.read(ctx, string(flight.Data))
	if errors.Is(err, ErrNotFound) {
		return "", time.Since(flight.Time) > flightGrace, nil
	}
	if err != nil {
		return "", false, err
	}
	operation := r.Operation
	goesOn, err := c.join(ctx, r, revision, rec.waiter())
	if err != nil || !goesOn {
		return "", err == nil, err
	}
	return operation, false, nil
}

// maxFlightTries outlasts flightGrace.
const maxFlightTries = 60

// releaseFlight lets the next equal request run by itself. A flight that stays is taken over.
func (c *Client) releaseFlight(ctx context.Context, rec *record) {
	if rec.Flight == 0 {
		return
	}
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	err := c.flights.DeleteMsg(ctx, rec.Flight)
	if err != nil && !isGone(err) {
		c.log.WarnContext(ctx, "release flight", "operation", rec.Operation, "err", err)
	}
}

// isGone tells the server's answer to deleting a message that is deleted. The library keeps its text only.
func isGone(err error) bool {
	return errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) &&
		(strings.Contains(err.Error(), "no message found") || strings.Contains(err.Error(), "message deleted"))
}

// errUnchanged is returned by a change that finds nothing to do.
var errUnchanged = errors.New("unchanged")

// finish makes r terminal with a status and no result.
func (r *record) finish(c code.Code, message string) {
	r.Stage, r.response, r.ResponseBlob, r.Note = repb.ExecutionStage_COMPLETED, statusResponse(c, message), nil, message
}

// statusResponse is a serialized ExecuteResponse that has a status only.
func statusResponse(c code.Code, message string) []byte {
	response, err := proto.Marshal(&repb.ExecuteResponse{Status: &status.Status{Code: int32(c), Message: message}})
	if err != nil {
		panic(fmt.Sprintf("marshal a status: %v", err)) // the message is ours and valid UTF-8
	}
	return response
}

func isUnavailable(err error) bool { return errors.Is(err, ErrUnavailable) }
