package broker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	space     = must(digest.SpaceOf("", repb.DigestFunction_SHA256, ""))
	errCached = errors.New("cached after all")
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func action(n int) digest.Digest { return space.Of(fmt.Appendf(nil, "action %d", n)) }

// submit queues an action and returns its operation.
func submit(t testing.TB, c *broker.Client, r broker.Request) string {
	t.Helper()
	operation, err := c.Submit(t.Context(), r)
	if err != nil {
		t.Fatalf("Submit(%v): %v", r.Action, err)
	}
	return operation
}

// next takes a job within ten seconds.
func next(t testing.TB, q *broker.Queue) *broker.Lease {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Second, errors.New("no job within 10 s"))
	defer cancel()
	l, err := q.Next(ctx)
	if err != nil {
		t.Fatalf("Next: %v", err)
	}
	return l
}

// begin takes a job and begins it.
func begin(t testing.TB, q *broker.Queue) *broker.Lease {
	t.Helper()
	l := next(t, q)
	if err := l.Begin(t.Context()); err != nil {
		t.Fatalf("Begin: %v", err)
	}
	return l
}

func outcome(exit int32) broker.Outcome {
	return broker.Outcome{Response: must(proto.Marshal(&repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: exit}}))}
}

func settle(t testing.TB, l *broker.Lease, exit int32) {
	t.Helper()
	if err := l.Settle(t.Context(), outcome(exit)); err != nil {
		t.Fatalf("Settle: %v", err)
	}
}

// response decodes what a done operation says.
func response(t testing.TB, op *broker.Operation) *repb.ExecuteResponse {
	t.Helper()
	r := new(repb.ExecuteResponse)
	if err := proto.Unmarshal(op.Response, r); err != nil {
		t.Fatalf("response of %s: %v", op.Name, err)
	}
	return r
}

// terminal watches an operation to its end, checks that it ends once, and returns the last state.
func terminal(t testing.TB, c *broker.Client, operation string) *broker.Operation {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 30*time.Second, errors.New("no terminal state within 30 s"))
	defer cancel()
	var last *broker.Operation
	for op, err := range c.Watch(ctx, operation) {
		if err != nil {
			t.Fatalf("Watch(%s): %v", operation, err)
		}
		if last != nil && last.Done() {
			t.Fatalf("Watch(%s) went on after the terminal state", operation)
		}
		last = op
	}
	if last == nil || !last.Done() {
		t.Fatalf("Watch(%s) ended with %+v, want a terminal state", operation, last)
	}
	return last
}

// eventually polls cond until it holds or half a minute has passed.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	within(t, 30*time.Second, what, cond)
}

func within(t testing.TB, bound time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(bound)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline.C:
			t.Fatalf("not within %v: %s", bound, what)
		case <-tick.C:
		}
	}
}

func worker(name string) broker.WorkerInfo { return broker.WorkerInfo{Name: name, Slots: 1} }

func TestOperationRunsToItsEnd(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	metadata := &repb.RequestMetadata{ToolInvocationId: "inv"}
	operation := submit(t, c, broker.Request{Action: action(1), Priority: 7, Metadata: metadata})

	op, err := c.Get(t.Context(), operation)
	if err != nil || op.Stage != repb.ExecutionStage_QUEUED || op.Action != action(1) || op.Invocation != "inv" {
		t.Fatalf("Get = %+v, %v, want a queued operation", op, err)
	}
	l := next(t, q)
	if job := l.Job(); job.Operation != operation || job.Action != action(1) || job.Priority != 7 || job.Metadata.GetToolInvocationId() != "inv" {
		t.Fatalf("Job = %+v", job)
	}
	if err := l.Begin(t.Context()); err != nil || l.Attempt() != 1 {
		t.Fatalf("Begin = %v, attempt %d, want attempt 1", err, l.Attempt())
	}
	if op, err = c.Get(t.Context(), operation); err != nil || op.Stage != repb.ExecutionStage_EXECUTING || op.Worker != "w1" {
		t.Fatalf("Get = %+v, %v, want it executing on w1", op, err)
	}
	settle(t, l, 3)
	if op := terminal(t, c, operation); response(t, op).GetResult().GetExitCode() != 3 {
		t.Fatalf("response %v, want exit code 3", response(t, op))
	}
	nothingLeft(t, farm)
}

// nothingLeft checks that no job, flight or watcher is left at the broker.
func nothingLeft(t testing.TB, farm *brokertest.Farm) {
	t.Helper()
	eventually(t, "empty JOBS and FLIGHTS", func() bool {
		return farm.Messages(t, "JOBS") == 0 && farm.Messages(t, "FLIGHTS") == 0
	})
	eventually(t, "no subscription to a status", func() bool { return farm.Subscriptions(t, "jetfarm.status.") == 0 })
}

func statusCode(r *repb.ExecuteResponse) code.Code { return code.Code(r.GetStatus().GetCode()) }

var quiet = slog.New(slog.DiscardHandler)

func itoa(n int) string { return strconv.Itoa(n) }

func contextWithTimeout(t testing.TB, d time.Duration) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithTimeoutCause(t.Context(), d, errors.New("the test's bound has passed"))
}
