package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// LogPart is a part of an output of an operation.
type LogPart struct {
	// Offset is where Data begins, or where a reader goes on.
	Offset int64
	Data   []byte
	// Attempt is the one that wrote Data.
	Attempt int
	// Done is the operation in its terminal state; it comes with the last part, which has no data. What
	// the output has from Offset on is in the blob that Operation.Output names.
	Done *Operation
}

const (
	// logRetry is how long a reader waits before it asks again about an operation that is said to run
	// where it does not, doubled up to logRetryMost.
	logRetry     = 100 * time.Millisecond
	logRetryMost = 2 * time.Second
	// logAnswer is how long a worker may take beyond logPatience.
	logAnswer = 2 * time.Second
)

// Log yields an output of an operation from offset on. With follow it goes on until the operation is
// done; without, until everything is read that was written so far.
//
// An operation that is run again writes its output again from the start: the reader goes on at its
// offset as soon as the new attempt has written as much. The last value is a part with Done, or an error,
// which wraps ErrNotFound or is context.Cause(ctx); without follow there may be neither. A reader
// does not count as somebody who waits for the operation. A reader that is slow holds nothing up.
func (c *Client) Log(ctx context.Context, name string, stream LogStream, offset int64, follow bool) iter.Seq2[LogPart, error] {
	return func(yield func(LogPart, error) bool) {
		operation, _, ok := parseName(name)
		if !ok {
			yield(LogPart{}, fmt.Errorf("%w: %.64q", ErrNotFound, name))
			return
		}
		w, err := c.watcher(operation, "")
		if err != nil {
			yield(LogPart{}, err)
			return
		}
		w.silent = true
		defer w.stop(ctx)
		f := &logFollower{w: w, question: logQuestion{Operation: operation, Stream: stream, Offset: offset, Wait: follow}}
		if err := f.run(ctx, yield); err != nil {
			yield(LogPart{}, err)
		}
	}
}

// logFollower reads one output of one operation.
type logFollower struct {
	w        *watcher
	question logQuestion
}

func (f *logFollower) run(ctx context.Context, yield func(LogPart, error) bool) error {
	op, err := f.w.current(ctx)
	retry := logRetry
	for err == nil {
		if !mayWrite(op) {
			if op.Done() {
				yield(LogPart{Offset: f.question.Offset, Done: op}, nil)
				return nil
			}
			if !f.question.Wait {
				return nil
			}
			op, err = f.w.next(ctx, op)
			continue
		}
		part, asked := f.ask(ctx, op.Worker)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case asked != nil || part.Attempt == 0:
			// It has not begun there, has ended, or the worker is gone: the record tells.
			var wanted bool
			if op, wanted, err = f.missed(ctx, op, retry, yield); err != nil || !wanted {
				return err
			}
			retry = min(2*retry, logRetryMost)
		case len(part.Data) > 0:
			if !yield(part, nil) {
				return nil
			}
			f.question.Offset += int64(len(part.Data))
			retry = logRetry
		case !f.question.Wait:
			return nil
		}
	}
	return err
}

// missed returns the state of an operation that its worker did not know, after a while if that is still
// said to run it, and whether the reader is to go on.
func (f *logFollower) missed(ctx context.Context, before *Operation, wait time.Duration, yield func(LogPart, error) bool) (op *Operation, wanted bool, err error) {
	op, err = f.w.current(ctx)
	switch {
	case err != nil:
		return nil, false, err
	case op.Done():
		yield(LogPart{Offset: f.question.Offset, Done: op}, nil)
		return op, false, nil
	case !f.question.Wait:
		return op, false, nil
	case op.Worker != before.Worker:
		return op, true, nil
	}
	bounded, cancel := context.WithTimeoutCause(ctx, wait, errWaited)
	defer cancel()
	next, err := f.w.next(bounded, op)
	switch {
	case ctx.Err() != nil:
		return nil, false, context.Cause(ctx)
	case bounded.Err() != nil:
		return op, true, nil
	}
	return next, true, err
}

// errWaited ends a wait that has no other end.
var errWaited = errors.New("waited long enough")

// mayWrite tells whether the worker may have output of an operation: it runs, or it was cancelled while
// it ran and its output is not yet stored.
func mayWrite(op *Operation) bool {
	if op.Stage == repb.ExecutionStage_EXECUTING {
		return op.Worker != ""
	}
	return op.Done() && op.Worker != "" && !op.kept && op.ResponseBlob.IsZero() && statusOf(op) == code.Code_CANCELLED
}

// ask asks a worker for the next part. Its Attempt is 0 when the worker does not run the operation.
func (f *logFollower) ask(ctx context.Context, worker string) (LogPart, error) {
	payload, err := json.Marshal(&f.question)
	if err != nil {
		return LogPart{}, fmt.Errorf("encode a question: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, logPatience+logAnswer, ErrUnavailable)
	defer cancel()
	if !validWorker(worker) {
		return LogPart{}, ErrUnknownWorker
	}
	reply, err := f.w.c.nc.RequestMsgWithContext(ctx, &nats.Msg{Subject: logSubject + worker, Data: payload})
	if err != nil {
		return LogPart{}, unavailable(cause(ctx, err))
	}
	part := LogPart{Offset: f.question.Offset, Data: reply.Data}
	if text := reply.Header.Get(attemptHeader); text != "" {
		if part.Attempt, err = strconv.Atoi(text); err != nil {
			return LogPart{}, fmt.Errorf("answer of worker %s: %w", worker, err)
		}
	}
	return part, nil
}

// Output names the blob of an output of a done operation, given its response, which may be nil. It is the
// zero Digest when there is none.
func (o *Operation) Output(stream LogStream, response *repb.ExecuteResponse) (digest.Digest, error) {
	if o.kept {
		if stream == Stderr {
			return o.stderr, nil
		}
		return o.stdout, nil
	}
	d := response.GetResult().GetStdoutDigest()
	if stream == Stderr {
		d = response.GetResult().GetStderrDigest()
	}
	if d == nil {
		return digest.Digest{}, nil
	}
	return o.Action.Space().Parse(d)
}
