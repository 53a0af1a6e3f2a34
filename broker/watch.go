package broker

import (
	"context"
	"fmt"
	"iter"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// watchBuffer is how many states of one operation may arrive while its watcher is busy. When more
// do, the watcher reads the record instead, so the number bounds memory and nothing else.
const watchBuffer = 8

// Get returns the current state of an operation, or as one of its waiters sees it. The error wraps ErrNotFound
// or ErrUnavailable.
func (c *Client) Get(ctx context.Context, name string) (*Operation, error) {
	operation, waiter, ok := parseName(name)
	if !ok {
		return nil, fmt.Errorf("%w: %.64q", ErrNotFound, name)
	}
	return c.get(ctx, operation, waiter)
}

func (c *Client) get(ctx context.Context, operation, waiter string) (*Operation, error) {
	r, revision, err := c.read(ctx, operation)
	if err != nil {
		return nil, err
	}
	return r.snapshotFor(waiter, revision)
}

// Watch yields the current state of an operation, or as one of its waiters sees it, at once and then newer ones
// as they come. A consumer that is slow misses states in between, never the terminal one, which is the last value. A state
// that does not change is repeated every Config.Heartbeat, after it was read again. An error is
// the last value too: it wraps ErrNotFound for an operation that does not exist or was deleted, and
// context.Cause(ctx) once ctx has ended. An unreachable broker is not an error: the watcher waits.
func (c *Client) Watch(ctx context.Context, name string) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		operation, waiter, ok := parseName(name)
		if !ok {
			yield(nil, fmt.Errorf("%w: %.64q", ErrNotFound, name))
			return
		}
		c.watch(ctx, operation, waiter, yield)
	}
}

func (c *Client) watch(ctx context.Context, operation, waiter string, yield func(*Operation, error) bool) {
	w, err := c.watcher(operation, waiter)
	if err != nil {
		yield(nil, err)
		return
	}
	defer w.stop(ctx)
	op, err := w.current(ctx)
	w.follow(ctx, op, err, yield)
}

// follow yields op and what comes after it, or err.
func (w *watcher) follow(ctx context.Context, op *Operation, err error, yield func(*Operation, error) bool) {
	for err == nil {
		wanted := w.hand(op, yield)
		if op.Done() {
			return
		}
		if !wanted {
			w.c.departed.add(w.operation)
			return
		}
		if w.behind {
			w.behind = false
			op, err = w.current(ctx)
			continue
		}
		op, err = w.next(ctx, op)
	}
	if ctx.Err() != nil {
		w.c.departed.add(w.operation)
	}
	yield(nil, err)
}

// hand yields a state, while others answer for the watcher.
func (w *watcher) hand(op *Operation, yield func(*Operation, error) bool) bool {
	w.c.busy.enter(w)
	defer w.c.busy.leave(w)
	return yield(op, nil)
}

// watcher follows one operation: one core NATS subscription and a buffer of watchBuffer messages, no
// goroutine and no JetStream consumer. Rejected: an ordered consumer per operation (28 KiB and three
// goroutines each, at most 1 000 per stream) and one subscription for all operations (each process
// would receive all of them).
type watcher struct {
	c         *Client
	operation string
	waiter    string
	messages  chan *nats.Msg
	sub       *nats.Subscription
	gap       <-chan struct{}
	dropped   int
	silent    bool      // does not count as somebody who waits for the operation
	refused   time.Time // since when no worker can serve the operation, or zero
	moved     bool      // whether it was put into a pool since the last heartbeat, or that failed
	behind    bool      // states came while it was busy, see busy.questions
}

// watcher subscribes. Whatever is stored after the server has seen the subscription arrives in
// messages or is counted as dropped; a read on the same connection tells what was stored before.
func (c *Client) watcher(operation, waiter string) (*watcher, error) {
	w := &watcher{c: c, operation: operation, waiter: waiter, messages: make(chan *nats.Msg, watchBuffer), gap: c.gapped()}
	var err error
	if w.sub, err = c.nc.ChanSubscribe(statusSubject+operation, w.messages); err != nil {
		return nil, unavailable(err)
	}
	return w, nil
}

func (w *watcher) stop(ctx context.Context) {
	if err := w.sub.Unsubscribe(); err != nil && !w.c.nc.IsClosed() {
		w.c.log.WarnContext(ctx, "unsubscribe from operation", "operation", w.operation, "err", err)
	}
}

// current reads the record, waiting for a broker that does not answer.
func (w *watcher) current(ctx context.Context) (*Operation, error) {
	for attempt := 0; ; attempt++ {
		op, err := w.c.get(ctx, w.operation, w.waiter)
		if err == nil || ctx.Err() != nil || !isUnavailable(err) {
			return op, err
		}
		if err := pause(ctx, attempt); err != nil {
			return nil, err
		}
	}
}

// next waits for a state newer than last, or returns last's successor or last itself after a
// heartbeat. While it waits, last is not kept: there may be very many watchers.
func (w *watcher) next(ctx context.Context, last *Operation) (*Operation, error) {
	heartbeat := time.NewTimer(w.beat(last))
	defer heartbeat.Stop()
	revision, homeless := last.Revision, last
	if !last.homeless() {
		homeless = nil
	}
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case msg := <-w.messages:
			op, err := w.newest(ctx, msg)
			if err != nil || w.lost() {
				return w.current(ctx)
			}
			if op != nil && op.Revision > revision {
				return op, nil
			}
		case <-w.stranded(homeless):
			w.move(ctx, homeless)
		case <-w.gap:
			w.gap = w.c.gapped()
			op, err := w.current(ctx)
			if err != nil || op.Revision > revision {
				return op, err
			}
		case <-heartbeat.C:
			op, err := w.current(ctx)
			if err == nil {
				w.moved = false
				w.giveUp(ctx, op)
				w.c.mend(ctx, op)
			}
			return op, err
		}
	}
}

// newest decodes the latest state of those that have arrived, and answers who asks for watchers. It
// returns nil when there was nothing else.
func (w *watcher) newest(ctx context.Context, msg *nats.Msg) (*Operation, error) {
	var state *nats.Msg
	for msg != nil {
		if question(msg) {
			w.answer(ctx, msg)
		} else {
			state = msg
		}
		select {
		case msg = <-w.messages:
		default:
			msg = nil
		}
	}
	if state == nil {
		return nil, nil //nolint:nilnil // no state is no error
	}
	revision, err := strconv.ParseUint(state.Header.Get("Nats-Sequence"), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("status of operation %s: %w", w.operation, err)
	}
	r, err := decodeRecord(state.Data)
	if err != nil {
		return nil, err
	}
	return r.snapshotFor(w.waiter, revision)
}

// lost tells whether the buffer overflowed since the last call.
func (w *watcher) lost() bool {
	dropped, err := w.sub.Dropped()
	lost := err != nil || dropped != w.dropped
	w.dropped = dropped
	return lost
}
