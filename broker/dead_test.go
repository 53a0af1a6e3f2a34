package broker_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// known waits until a client has heard of so many workers.
func known(t testing.TB, c *broker.Client, workers int) {
	t.Helper()
	eventually(t, "the workers are known", func() bool { return len(c.Workers()) == workers })
}

// TestFailedWorkerHandsTheJobOn: what a worker has failed on goes to another one while there is one
// (row D22), and to any when there is none or the others are drained.
func TestFailedWorkerHandsTheJobOn(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	first, second := brokertest.Queue(t, c, worker("w1")), brokertest.Queue(t, c, worker("w2"))
	known(t, c, 2)
	operation := submit(t, c, broker.Request{Action: action(1)})
	if err := begin(t, first).Return(t.Context(), "the disk is full"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := contextWithTimeout(t, 2*time.Second)
	defer cancel()
	if l, err := first.Next(ctx); err == nil {
		t.Fatalf("w1 took attempt %d although w2 is there", l.Tries())
	}
	second.Drain(t.Context())
	eventually(t, "the drain is known", func() bool { return c.Workers()[1].Draining })
	l := begin(t, first)
	op := must(c.Get(t.Context(), operation))
	if len(op.Failures) != 1 || op.Failures[0].Worker != "w1" || op.Failures[0].Reason != "the disk is full" || op.Failures[0].At.IsZero() {
		t.Errorf("failures are %+v, want the one of w1", op.Failures)
	}
	settle(t, l, 0)
	terminal(t, c, operation)
	nothingLeft(t, farm)
}

// TestDeathsAreAttempts: workers that die with an action use its attempts up like those that give it
// back, and the third ends it (rows D22 and X-113).
func TestDeathsAreAttempts(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{AckWait: 300 * time.Millisecond})
	operation := submit(t, c, broker.Request{Action: action(1), Platform: nil, Priority: -2})
	dead := []*broker.Queue{c.Queue(worker("w1")), c.Queue(worker("w2"))} // neither renews
	var old []*broker.Lease
	for _, q := range dead {
		old = append(old, begin(t, q))
	}
	q := brokertest.Queue(t, c, worker("w3"))
	if err := begin(t, q).Return(t.Context(), "the disk is full"); !errors.Is(err, broker.ErrExhausted) {
		t.Fatalf("Return of the third attempt = %v, want ErrExhausted", err)
	}
	op := terminal(t, c, operation)
	text := response(t, op).GetStatus().GetMessage()
	for _, part := range []string{"all 3 attempts", "w1: the worker died", "w2: the worker died", "w3: the disk is full"} {
		if !strings.Contains(text, part) {
			t.Errorf("message %q lacks %q", text, part)
		}
	}
	if got := statusCode(response(t, op)); got != code.Code_UNAVAILABLE || len(op.Failures) != 3 {
		t.Errorf("status %v after %+v", got, op.Failures)
	}
	for _, l := range old {
		if err := l.Settle(t.Context(), outcome(0)); !errors.Is(err, broker.ErrLost) {
			t.Errorf("Settle of a dead worker = %v, want ErrLost", err)
		}
	}
	letters, more, err := c.Dead(t.Context(), 10)
	if err != nil || more || len(letters) != 1 {
		t.Fatalf("Dead = %+v, %v, %v, want one letter", letters, more, err)
	}
	if l := letters[0]; l.Name != operation || len(l.Failures) != 3 || l.Priority != -2 || l.Note != text || !l.Done() {
		t.Errorf("letter is %+v", l)
	}
	nothingLeft(t, farm)
}

// TestLastDeathEndsTheOperation: when the worker of the last attempt dies, the next one that is given
// the job ends it and does not run it.
func TestLastDeathEndsTheOperation(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{AckWait: 300 * time.Millisecond})
	operation := submit(t, c, broker.Request{Action: action(1)})
	for _, name := range []string{"w1", "w2", "w3"} {
		l := begin(t, c.Queue(worker(name)))
		defer l.Drop(context.WithoutCancel(t.Context()))
	}
	q := brokertest.Queue(t, c, worker("w4"))
	if err := next(t, q).Begin(t.Context()); !errors.Is(err, broker.ErrLost) {
		t.Fatalf("Begin of a fourth attempt = %v, want ErrLost", err)
	}
	op, err := c.Get(t.Context(), operation)
	if err != nil || !op.Done() || statusCode(response(t, op)) != code.Code_UNAVAILABLE || op.Attempt != 3 {
		t.Errorf("the operation is %+v, %v", op, err)
	}
	for stream, want := range map[string]uint64{"DEAD": 1, "JOBS": 0, "FLIGHTS": 0} {
		if got := farm.Messages(t, stream); got != want {
			t.Errorf("%d messages in %s, want %d", got, stream, want)
		}
	}
}

// TestRetry submits the action of a letter again and removes the letter; the operation goes on although
// nobody watches it.
func TestRetry(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, farm.ClientWith(t, broker.Config{Abandoned: 100 * time.Millisecond, Heartbeat: 50 * time.Millisecond}), worker("w1"))
	request := broker.Request{
		Action: action(1), Priority: 3, SkipCacheLookup: true, Metadata: &repb.RequestMetadata{ToolInvocationId: "inv"},
	}
	operation := submit(t, c, request)
	for range broker.MaxAttempts {
		if err := begin(t, q).Return(t.Context(), "the disk is full"); err != nil && !errors.Is(err, broker.ErrExhausted) {
			t.Fatal(err)
		}
	}
	if _, err := c.Retry(t.Context(), "AAAAAAAAAAAAAAAAAAAAAAAAAA"); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("Retry of an unknown operation = %v, want ErrNotFound", err)
	}
	again, err := c.Retry(t.Context(), operation)
	if err != nil || again == operation {
		t.Fatalf("Retry = %s, %v", again, err)
	}
	if got := farm.Messages(t, "DEAD"); got != 0 {
		t.Errorf("%d letters after the retry, want none", got)
	}
	l := begin(t, q)
	if job := l.Job(); job.Operation != again || job.Action != action(1) || job.Priority != 3 || !job.SkipCacheLookup || l.Tries() != 1 {
		t.Errorf("job is %+v, try %d", job, l.Tries())
	}
	ctx, cancel := contextWithTimeout(t, 3*time.Second) // three times as long as it takes to be missed by all
	defer cancel()
	if err := l.Guard(ctx); ctx.Err() == nil {
		t.Errorf("Guard = %v, want the operation to go on", err)
	}
	settle(t, l, 0)
	if op := terminal(t, c, again); op.Invocation != "inv" || statusCode(response(t, op)) != code.Code_OK {
		t.Errorf("the retried operation is %+v", op)
	}
	nothingLeft(t, farm)
}

// TestLettersAreBounded: one letter for each operation, listed in parts.
func TestLettersAreBounded(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	for n := range 3 {
		submit(t, c, broker.Request{Action: action(n)})
		for range broker.MaxAttempts {
			if err := begin(t, q).Return(t.Context(), strings.Repeat("long ", 1000)); err != nil && !errors.Is(err, broker.ErrExhausted) {
				t.Fatal(err)
			}
		}
	}
	letters, more, err := c.Dead(t.Context(), 2)
	if err != nil || !more || len(letters) != 2 || letters[0].Action != action(0) || letters[1].Action != action(1) {
		t.Errorf("Dead(2) = %+v, %v, %v, want the two oldest of more", letters, more, err)
	}
	if n := len(letters[0].Note); n > 2000 {
		t.Errorf("a note of %d bytes", n)
	}
	if letters, more, err = c.Dead(t.Context(), 3); err != nil || more || len(letters) != 3 {
		t.Errorf("Dead(3) = %+v, %v, %v, want all", letters, more, err)
	}
}
