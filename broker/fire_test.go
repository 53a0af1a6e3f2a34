package broker_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// serve runs every job that comes to q at once until ctx ends.
func serve(ctx context.Context, q *broker.Queue, run func(*broker.Lease) error) error {
	for {
		l, err := q.Next(ctx)
		if err != nil {
			return errIfRunning(ctx, err)
		}
		if err := l.Begin(ctx); errors.Is(err, broker.ErrLost) {
			continue
		} else if err != nil {
			return err
		}
		if err := run(l); err != nil {
			return err
		}
	}
}

// errIfRunning is err while ctx has not ended.
func errIfRunning(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil //nolint:nilerr // being stopped is no error
	}
	return err
}

// TestEnqueue_Concurrent: distinct actions from many submitters on fast workers all end, once each
// (audit row 7).
func TestEnqueue_Concurrent(t *testing.T) {
	const submitters, each = 8, 125
	farm := brokertest.Start(t)
	c := farm.Client(t)
	var runs atomic.Int64
	ctx, stop := context.WithCancelCause(t.Context())
	var workers errgroup.Group
	for _, name := range []string{"w1", "w2", "w3"} {
		q := brokertest.Queue(t, farm.Client(t), worker(name))
		workers.Go(func() error {
			return serve(ctx, q, func(l *broker.Lease) error { runs.Add(1); return l.Settle(ctx, outcome(0)) })
		})
	}
	var group errgroup.Group
	for s := range submitters {
		group.Go(func() error {
			for i := range each {
				operation, err := c.Submit(ctx, broker.Request{Action: action(s*each + i)})
				if err != nil {
					return err
				}
				ends := 0
				for op, err := range c.Watch(ctx, operation) {
					if err != nil {
						return err
					}
					if op.Done() {
						ends++
					}
				}
				if ends != 1 {
					t.Errorf("operation %s had %d terminal states", operation, ends)
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	stop(nil)
	if err := workers.Wait(); err != nil {
		t.Fatal(err)
	}
	if runs.Load() != submitters*each {
		t.Errorf("%d runs, want %d", runs.Load(), submitters*each)
	}
	nothingLeft(t, farm)
}

// TestEqualActionsRunOnce: equal requests in flight share one operation, and one that comes after
// it finds the result by Confirm (row EXA-16).
func TestEqualActionsRunOnce(t *testing.T) {
	farm := brokertest.Start(t)
	c, other := farm.Client(t), farm.Client(t)
	q := brokertest.Queue(t, farm.Client(t), worker("w1"))
	var cached atomic.Bool
	confirm := func(context.Context) error {
		if cached.Load() {
			return errCached
		}
		return nil
	}
	var mu sync.Mutex
	operations := map[string]bool{}
	var group errgroup.Group
	for i := range 50 {
		from := c
		if i%2 == 0 {
			from = other
		}
		group.Go(func() error {
			operation, err := from.Submit(t.Context(), broker.Request{Action: action(1), Confirm: confirm})
			mu.Lock()
			defer mu.Unlock()
			operations[operation] = true
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(operations) != 1 {
		t.Fatalf("50 equal requests made %d operations, want 1", len(operations))
	}
	l := begin(t, q)
	cached.Store(true)
	settle(t, l, 0)
	for operation := range operations {
		terminal(t, other, operation)
	}
	if _, err := c.Submit(t.Context(), broker.Request{Action: action(1), Confirm: confirm}); !errors.Is(err, errCached) {
		t.Errorf("Submit after the end = %v, want Confirm's error", err)
	}
	nothingLeft(t, farm)
}

func TestRequestsThatMustNotMerge(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	requests := []broker.Request{
		{Action: action(1)},
		{Action: action(1), DoNotCache: true},
		{Action: action(1), DoNotCache: true},
		{Action: action(1), SkipCacheLookup: true},
		{Action: action(2)},
	}
	seen := map[string]int{}
	for i, r := range requests {
		operation := submit(t, c, r)
		if before, ok := seen[operation]; ok {
			t.Errorf("request %d joined request %d", i, before)
		}
		seen[operation] = i
	}
}

// A worker that lost its lease changes nothing (audit hazard H12, row
// EXR-16).
func TestEXR_16_X_114_X_115_StaleAttemptCannotSettle(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{AckWait: 300 * time.Millisecond})
	stalled := c.Queue(worker("stalled")) // never renews: it does not Run
	q := brokertest.Queue(t, c, worker("w2"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	old := begin(t, stalled)
	l := begin(t, q)
	if l.Attempt() != 2 {
		t.Fatalf("attempt %d, want 2", l.Attempt())
	}
	if err := old.Guard(t.Context()); !errors.Is(err, broker.ErrLost) {
		t.Errorf("Guard of the stale lease = %v, want ErrLost", err)
	}
	if err := old.Settle(t.Context(), outcome(1)); !errors.Is(err, broker.ErrLost) {
		t.Errorf("Settle of the stale lease = %v, want ErrLost", err)
	}
	settle(t, l, 2)
	if err := old.Settle(t.Context(), outcome(1)); !errors.Is(err, broker.ErrLost) {
		t.Errorf("Settle after the end = %v, want ErrLost", err)
	}
	if got := response(t, terminal(t, c, operation)).GetResult().GetExitCode(); got != 2 {
		t.Errorf("exit code %d, want that of the second attempt", got)
	}
	nothingLeft(t, farm)
}

// TestOvertakenStateIsNeverSeen: watchers are told of stored states only, so the refused write of a
// stale worker does not reach them although it was published to the same subject.
func TestOvertakenStateIsNeverSeen(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{AckWait: 300 * time.Millisecond})
	stalled := c.Queue(worker("stalled"))
	q := brokertest.Queue(t, c, worker("w2"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	old := begin(t, stalled)
	l := begin(t, q)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	for op, err := range c.Watch(ctx, operation) {
		if err != nil {
			t.Fatal(err)
		}
		if op.Done() {
			if got := response(t, op).GetResult().GetExitCode(); got != 2 {
				t.Fatalf("a watcher saw exit code %d, want 2", got)
			}
			break
		}
		if err := old.Settle(t.Context(), outcome(1)); !errors.Is(err, broker.ErrLost) {
			t.Fatalf("Settle of the stale lease = %v, want ErrLost", err)
		}
		settle(t, l, 2)
	}
}

func TestReturnedJobGoesToAnotherWorker(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	first, second := brokertest.Queue(t, c, worker("w1")), brokertest.Queue(t, c, worker("w2"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	if err := begin(t, first).Return(t.Context(), "the disk is full"); err != nil {
		t.Fatalf("Return: %v", err)
	}
	op, err := c.Get(t.Context(), operation)
	if err != nil || op.Stage != repb.ExecutionStage_QUEUED || op.Note != "the disk is full" {
		t.Fatalf("Get = %+v, %v, want it queued with the reason", op, err)
	}
	l := begin(t, second)
	if l.Attempt() != 2 {
		t.Errorf("attempt %d, want 2", l.Attempt())
	}
	settle(t, l, 0)
	terminal(t, c, operation)
	nothingLeft(t, farm)
}

func TestCancel(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))

	queued := submit(t, c, broker.Request{Action: action(1)})
	if err := c.Cancel(t.Context(), queued); err != nil {
		t.Fatalf("Cancel of a queued operation: %v", err)
	}
	if got := statusCode(response(t, terminal(t, c, queued))); got != code.Code_CANCELLED {
		t.Errorf("status %v, want CANCELLED", got)
	}
	nothingLeft(t, farm)

	running := submit(t, c, broker.Request{Action: action(2)})
	l := begin(t, q)
	var guard errgroup.Group
	guard.Go(func() error { return l.Guard(t.Context()) })
	if err := c.Cancel(t.Context(), running); err != nil {
		t.Fatalf("Cancel of a running operation: %v", err)
	}
	if err := guard.Wait(); !errors.Is(err, broker.ErrCancelled) {
		t.Errorf("Guard = %v, want ErrCancelled", err)
	}
	if err := l.Settle(t.Context(), outcome(0)); !errors.Is(err, broker.ErrLost) {
		t.Errorf("Settle after a cancel = %v, want ErrLost", err)
	}
	if err := c.Cancel(t.Context(), running); err != nil {
		t.Errorf("Cancel of a done operation = %v, want nil", err)
	}
	if err := c.Cancel(t.Context(), "nobody"); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("Cancel of an unknown operation = %v, want ErrNotFound", err)
	}
	nothingLeft(t, farm)
}

// A watcher that is busy while many states pass sees the last one
// (audit rows 10 and 17).
func TestOPS_9_SlowWaiterStillGetsTerminal(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	seen := 0
	for op, err := range c.Watch(t.Context(), operation) {
		if err != nil {
			t.Fatal(err)
		}
		seen++
		if seen == 1 {
			for range 6 {
				if err := begin(t, q).HandOver(t.Context(), "again"); err != nil {
					t.Fatal(err)
				}
			}
			settle(t, begin(t, q), 9)
		}
		if op.Done() && response(t, op).GetResult().GetExitCode() != 9 {
			t.Fatalf("terminal state %+v", op)
		}
	}
	if seen > 12 {
		t.Errorf("a slow watcher was given %d states, want them conflated", seen)
	}
}

func TestDeleteEndsWaiters(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Heartbeat: 50 * time.Millisecond})
	operation := submit(t, c, broker.Request{Action: action(1)})
	var last error
	for op, err := range c.Watch(t.Context(), operation) {
		if last = err; err == nil && op.Revision > 0 {
			if err := c.Delete(t.Context(), operation); err != nil && !errors.Is(err, broker.ErrNotFound) {
				t.Fatal(err)
			}
		}
	}
	if !errors.Is(last, broker.ErrNotFound) {
		t.Errorf("Watch of a deleted operation ended with %v, want ErrNotFound", last)
	}
}

// Test1000WaitersLeaveNoConsumers: watchers cost a subscription each while they wait, and nothing
// after (audit rows 10 and 19).
func Test1000WaitersLeaveNoConsumers(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	operation := submit(t, c, broker.Request{Action: action(1)})
	before := farm.Consumers(t, "OPERATIONS")
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("client gone")
	var waiting sync.WaitGroup
	var group errgroup.Group
	for range 1000 {
		waiting.Add(1)
		group.Go(func() error {
			first := true
			for _, err := range c.Watch(ctx, operation) {
				if errors.Is(err, gone) {
					return nil
				}
				if err != nil {
					return err
				}
				if first {
					first = false
					waiting.Done()
				}
			}
			return errors.New("the watch ended by itself")
		})
	}
	waiting.Wait()
	if got := farm.Consumers(t, "OPERATIONS"); got != before {
		t.Errorf("%d consumers with 1000 watchers, want %d", got, before)
	}
	cancel(gone)
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no status subscription", func() bool { return farm.Subscriptions(t, "jetfarm.status.") == 0 })
}

func TestQueueFullLeavesNothing(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{MaxQueued: 2})
	submit(t, c, broker.Request{Action: action(1)})
	submit(t, c, broker.Request{Action: action(2)})
	if _, err := c.Submit(t.Context(), broker.Request{Action: action(3)}); !errors.Is(err, broker.ErrQueueFull) {
		t.Fatalf("third Submit = %v, want ErrQueueFull", err)
	}
	if got := farm.Messages(t, "FLIGHTS"); got != 2 {
		t.Errorf("%d flights, want 2", got)
	}
	// A fourth equal to the first joins it although the queue is full.
	submit(t, c, broker.Request{Action: action(1)})
}

// TestDeathBetweenRecordAndJob: a record without a job is queued again by whoever watches it.
func TestDeathBetweenRecordAndJob(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Heartbeat: 20 * time.Millisecond, MendAfter: time.Millisecond})
	operation := submit(t, c, broker.Request{Action: action(1)})
	farm.Purge(t, "JOBS")
	q := brokertest.Queue(t, c, worker("w1"))
	var group errgroup.Group
	group.Go(func() error { settle(t, begin(t, q), 0); return nil })
	terminal(t, c, operation)
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, farm)
}

func TestX_119_ServerRestart(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	l := begin(t, q)
	var watch errgroup.Group
	started := make(chan struct{})
	watch.Go(func() error {
		once := sync.OnceFunc(func() { close(started) })
		for op, err := range c.Watch(t.Context(), operation) {
			once()
			if err != nil || op.Done() {
				return err
			}
		}
		return errors.New("the watch ended by itself")
	})
	<-started
	farm.Restart(t)
	eventually(t, "ready again", func() bool { return c.Ready(t.Context()) == nil })
	settle(t, l, 0)
	if err := watch.Wait(); err != nil {
		t.Errorf("Watch over a restart: %v", err)
	}
	second := submit(t, c, broker.Request{Action: action(2)})
	settle(t, begin(t, q), 0)
	terminal(t, c, second)
	nothingLeft(t, farm)
}

// TestHandOverIsNoTry: a worker that is shut down does not use up the tries of an action.
func TestHandOverIsNoTry(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	if err := begin(t, q).HandOver(t.Context(), "shutting down"); err != nil {
		t.Fatal(err)
	}
	l := begin(t, q)
	if l.Attempt() != 2 || l.Tries() != 1 {
		t.Errorf("attempt %d, tries %d, want 2 and 1", l.Attempt(), l.Tries())
	}
	if err := l.Return(t.Context(), "disk full"); err != nil {
		t.Fatal(err)
	}
	l = begin(t, q)
	if l.Attempt() != 3 || l.Tries() != 2 {
		t.Errorf("attempt %d, tries %d, want 3 and 2", l.Attempt(), l.Tries())
	}
	settle(t, l, 0)
	terminal(t, c, operation)
	nothingLeft(t, farm)
}
