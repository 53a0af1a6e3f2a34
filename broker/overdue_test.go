package broker_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// beginWithin is begin with a limit of the attempt.
func beginWithin(t testing.TB, q *broker.Queue, limit time.Duration) *broker.Lease {
	t.Helper()
	l := next(t, q)
	l.Limit(limit)
	if err := l.Begin(t.Context()); err != nil {
		t.Fatalf("Begin: %v", err)
	}
	return l
}

// unacknowledged is how many jobs of the default pool some worker has.
func unacknowledged(t testing.TB, farm *brokertest.Farm) (n int) {
	t.Helper()
	js := must(jetstream.New(farm.Connect(t)))
	for lane := range broker.Lanes {
		n += must(js.Consumer(t.Context(), "JOBS", "any-"+itoa(lane))).CachedInfo().NumAckPending
	}
	return n
}

// TestX_118_WorkerThatHangsAndBeats: an attempt that its worker renews and never ends is taken from it and runs
// elsewhere; what the worker says of it later counts for nothing.
func TestX_118_WorkerThatHangsAndBeats(t *testing.T) {
	farm := brokertest.Start(t)
	h := record(t, farm)
	c := reconciling(t, farm)
	hung := brokertest.Queue(t, c, worker("hung"))
	data := []byte("the action")
	operation := submit(t, c, broker.Request{Action: action(1), ActionData: data})
	l := beginWithin(t, hung, 300*time.Millisecond)
	guarded := make(chan error, 1)
	var group errgroup.Group
	group.Go(func() error { guarded <- l.Guard(t.Context()); return nil })

	other := next(t, brokertest.Queue(t, c, worker("other")))
	if got := other.Job(); got.Operation != operation || string(got.ActionData) != string(data) {
		t.Errorf("the other worker has %+v, want the operation with its action", got)
	}
	op := must(c.Get(t.Context(), operation))
	if op.Stage != repb.ExecutionStage_QUEUED || !strings.Contains(op.Note, "hung: the attempt did not end within 300ms") {
		t.Errorf("the operation is %+v", op)
	}
	if err := <-guarded; !errors.Is(err, broker.ErrLost) {
		t.Errorf("Guard = %v, want ErrLost", err)
	}
	if err := l.Settle(t.Context(), outcome(1)); !errors.Is(err, broker.ErrLost) {
		t.Errorf("Settle of what was taken away = %v, want ErrLost", err)
	}
	other.Limit(time.Hour)
	if err := other.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	settle(t, other, 2)
	op = must(c.Get(t.Context(), operation))
	if got := response(t, op).GetResult().GetExitCode(); got != 2 || op.Attempt != 2 {
		t.Errorf("exit code %d of attempt %d, want 2 of 2", got, op.Attempt)
	}
	if len(op.Failures) != 1 || op.Failures[0].Worker != "hung" || !strings.Contains(op.Failures[0].Reason, "taken from the worker") {
		t.Errorf("failures are %+v", op.Failures)
	}
	h.check(t, farm)
	eventually(t, "no worker has a job", func() bool { return unacknowledged(t, farm) == 0 })
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
}

// TestHangingWorkersAreAttempts: an action that makes every worker hang is set aside.
func TestHangingWorkersAreAttempts(t *testing.T) {
	farm := brokertest.Start(t)
	c := reconciling(t, farm)
	operation := submit(t, c, broker.Request{Action: action(1)})
	for n := range broker.MaxAttempts {
		l := beginWithin(t, brokertest.Queue(t, c, worker("hung-"+itoa(n))), 200*time.Millisecond)
		defer l.Drop(t.Context())
	}
	op := ended(t, c, operation)
	if statusCode(response(t, op)) != code.Code_UNAVAILABLE || len(op.Failures) != broker.MaxAttempts {
		t.Errorf("the operation is %+v", op)
	}
	for n, f := range op.Failures {
		if f.Worker != "hung-"+itoa(n) || !strings.Contains(f.Reason, "did not end within") {
			t.Errorf("failure %d is %+v", n, f)
		}
	}
	if letters, _, err := c.Dead(t.Context(), 9); err != nil || len(letters) != 1 {
		t.Errorf("letters %+v, %v", letters, err)
	}
	if jobs, flights := farm.Messages(t, "JOBS"), farm.Messages(t, "FLIGHTS"); jobs+flights > 0 {
		t.Errorf("%d jobs and %d flights are left", jobs, flights)
	}
	eventually(t, "no worker has a job", func() bool { return unacknowledged(t, farm) == 0 })
}

// TestAttemptWithinItsLimit: what takes long, or has no limit, is left alone.
func TestAttemptWithinItsLimit(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Reconcile: time.Hour, MendAfter: time.Millisecond})
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Slots: 2})
	var leases []*broker.Lease
	for n, limit := range []time.Duration{0, time.Hour} {
		submit(t, c, broker.Request{Action: action(n)})
		leases = append(leases, beginWithin(t, q, limit))
	}
	pauseFor(t, 50*time.Millisecond)
	for range 3 {
		if err := c.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range leases {
		settle(t, l, 0)
		if op := must(c.Get(t.Context(), l.Job().Operation)); op.Attempt != 1 || len(op.Failures) != 0 || !op.Done() {
			t.Errorf("the operation is %+v", op)
		}
	}
	nothingLeft(t, farm)
}

// TestDeathWhileTakingAnAttempt: a process that dies while it takes an attempt from a worker, which renews it
// all the time, leaves an operation that ends once.
func TestDeathWhileTakingAnAttempt(t *testing.T) {
	t.Parallel()
	for _, m := range moments("$JS.API.STREAM.MSG.DELETE.JOBS", "jetfarm.op.", "jetfarm.job.") {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			farm := brokertest.Start(t)
			h := record(t, farm)
			cutter := farm.Cutter(t)
			dies := cutter.Client(t, farm, broker.Config{AckWait: 500 * time.Millisecond, MendAfter: 100 * time.Millisecond})
			deaf := farm.Deaf(t, broker.Config{AckWait: 500 * time.Millisecond})
			operation := submit(t, deaf, broker.Request{Action: action(1)})
			beginWithin(t, brokertest.Queue(t, deaf, worker("hung")), 150*time.Millisecond) // nobody guards it
			pauseFor(t, 300*time.Millisecond)
			cutter.Arm(m.subject, m.after)
			var group errgroup.Group
			ctx, kill := context.WithCancelCause(t.Context())
			group.Go(func() error {
				_ = dies.Reconcile(ctx) //nolint:errcheck // it is dead
				return nil
			})
			<-cutter.Cut()
			kill(nil)
			c := survivors(t, farm)
			if names := h.check(t, farm); len(names) != 1 || names[0] != operation {
				t.Errorf("operations %v have ended, want %s", names, operation)
			}
			op := must(c.Get(t.Context(), operation))
			if got := response(t, op).GetResult().GetExitCode(); got != 2 || len(op.Failures) != 1 || op.Failures[0].Worker != "hung" {
				t.Errorf("exit code %d of %+v", got, op)
			}
			if err := group.Wait(); err != nil {
				t.Error(err)
			}
			eventually(t, "no worker has a job", func() bool { return unacknowledged(t, farm) == 0 })
		})
	}
}

// TestX_118_X_111_WaitersDoNotKeepWhatHangs: clients that join an attempt and cancel do not make it begin anew.
func TestX_118_X_111_WaitersDoNotKeepWhatHangs(t *testing.T) {
	farm := brokertest.Start(t)
	c := reconciling(t, farm)
	q := brokertest.Queue(t, c, worker("hung"))
	request := broker.Request{Action: action(1)}
	operation := submit(t, c, request)
	l := beginWithin(t, q, time.Second)
	defer l.Drop(t.Context())
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	eventually(t, "the end of the attempt", func() bool {
		<-tick.C
		for op, err := range c.Execute(t.Context(), request) {
			if err == nil && !op.Done() {
				err = c.Cancel(t.Context(), op.WaiterName())
			}
			if err != nil || broker.OperationOf(op.WaiterName()) != operation {
				t.Fatalf("Execute = %+v, %v, want a waiter of %s", op, err, operation)
			}
		}
		return len(must(c.Get(t.Context(), operation)).Failures) == 1
	})
}
