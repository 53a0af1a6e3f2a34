package broker_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// Not long, and longer than a watcher takes to answer on a busy machine.
const abandonedSoon = 500 * time.Millisecond

// An operation that waits in the queue is cancelled when its last watcher has left, and not before.
func TestOPS_10_X_109_QueuedOperationIsCancelledWhenTheLastWatcherLeaves(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	first := farm.ClientWith(t, broker.Config{Abandoned: abandonedSoon})
	second := farm.ClientWith(t, broker.Config{Abandoned: abandonedSoon})
	operation := submit(t, first, broker.Request{Action: action(1)})
	stays, leaveLater := context.WithCancel(t.Context())
	defer leaveLater()
	var watchers errgroup.Group
	watchers.Go(func() error { return watchUntil(stays, second, operation) })
	leaves, leaveNow := context.WithCancel(t.Context())
	watchers.Go(func() error { return watchUntil(leaves, first, operation) })
	awaitWatchers(t, farm, operation, 2)
	leaveNow()

	// Long enough for the first one's departure to be looked into.
	quiet := time.NewTimer(abandonedSoon + 3*time.Second)
	<-quiet.C
	op, err := first.Get(t.Context(), operation)
	if err != nil || op.Done() {
		t.Fatalf("with one watcher left the operation is %+v, %v", op, err)
	}
	if n := farm.Messages(t, "JOBS"); n != 1 {
		t.Errorf("%d jobs, want the one of the operation", n)
	}
	leaveLater()
	checkAbandoned(t, farm, first, operation)
	if err := watchers.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// The worker finds out that nobody watches what it runs, whoever has submitted it is dead.
func TestOPS_10_RunningOperationIsCancelledWhenNobodyWatches(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, farm.ClientWith(t, broker.Config{Abandoned: abandonedSoon, Heartbeat: 100 * time.Millisecond}), worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var watcher errgroup.Group
	watcher.Go(func() error { return watchUntil(ctx, c, operation) })
	awaitWatchers(t, farm, operation, 1)
	l := begin(t, q)
	guarded := make(chan error, 1)
	var guard errgroup.Group
	guard.Go(func() error { guarded <- l.Guard(t.Context()); return nil })
	quiet := time.NewTimer(abandonedSoon + 3*time.Second)
	select {
	case err := <-guarded:
		t.Fatalf("a watched operation ended with %v", err)
	case <-quiet.C:
	}
	leave()
	if err := <-guarded; !errors.Is(err, broker.ErrCancelled) {
		t.Errorf("Guard = %v, want ErrCancelled", err)
	}
	l.Drop(t.Context())
	if err := errors.Join(guard.Wait(), ignoreCancel(watcher.Wait())); err != nil {
		t.Error(err)
	}
	checkAbandoned(t, farm, c, operation)
}

// A watcher that is busy for longer than watchers have to answer, as with a client that takes nothing from its
// stream, is still there: nothing is cancelled, and when it looks again it sees the end.
func TestBusyWatcherHasNotLeft(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, farm.ClientWith(t, broker.Config{Abandoned: abandonedSoon, Heartbeat: 100 * time.Millisecond}), worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	busy, free := make(chan struct{}), make(chan struct{})
	var last *broker.Operation
	var watcher errgroup.Group
	watcher.Go(func() error {
		for op, err := range c.Watch(t.Context(), operation) {
			if err != nil {
				return err
			}
			if last == nil {
				close(busy)
				<-free
			}
			last = op
		}
		return nil
	})
	<-busy
	l := begin(t, q)
	guarded := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var guard errgroup.Group
	guard.Go(func() error { guarded <- l.Guard(ctx); return nil })
	quiet := time.NewTimer(abandonedSoon + 6*time.Second)
	select {
	case err := <-guarded:
		t.Errorf("the operation of a watcher that is busy ended with %v", err)
	case <-quiet.C:
		cancel()
		<-guarded
		settle(t, l, 7)
	}
	// What has come meanwhile may have been taken from the watcher already.
	quiet.Reset(time.Second)
	<-quiet.C
	close(free)
	if err := errors.Join(guard.Wait(), watcher.Wait()); err != nil {
		t.Error(err)
	}
	if last == nil || !last.Done() || !t.Failed() && response(t, last).GetResult().GetExitCode() != 7 {
		t.Errorf("the watcher saw %+v last, want the end", last)
	}
}

// watchUntil watches until ctx or the operation ends.
func watchUntil(ctx context.Context, c *broker.Client, operation string) error {
	for _, err := range c.Watch(ctx, operation) {
		if err != nil {
			return err
		}
	}
	return nil
}

func ignoreCancel(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// awaitWatchers waits until so many clients watch the operation.
func awaitWatchers(t *testing.T, farm *brokertest.Farm, operation string, n int) {
	t.Helper()
	eventually(t, "watchers of the operation", func() bool { return farm.Subscriptions(t, "jetfarm.status."+operation) >= n })
}

// checkAbandoned waits for the end of the operation, which must be CANCELLED, and of its job.
func checkAbandoned(t *testing.T, farm *brokertest.Farm, c *broker.Client, operation string) {
	t.Helper()
	var op *broker.Operation
	eventually(t, "end of the operation", func() bool { // a watch would keep it
		op = must(c.Get(t.Context(), operation))
		return op.Done()
	})
	if got := statusCode(response(t, op)); got != code.Code_CANCELLED {
		t.Errorf("an abandoned operation ended with %v, want CANCELLED", got)
	}
	eventually(t, "end of the job", func() bool { return farm.Messages(t, "JOBS") == 0 })
}
