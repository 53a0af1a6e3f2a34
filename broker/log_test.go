package broker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// output is what an action has written, as its worker sees it.
type output struct {
	mu      sync.Mutex
	attempt int
	text    string
	asked   int
}

func (o *output) read(_ string, stream broker.LogStream, offset int64, p []byte) (n, attempt int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked++
	if stream != broker.Stdout || offset > int64(len(o.text)) {
		return 0, o.attempt, nil
	}
	return copy(p, o.text[offset:]), o.attempt, nil
}

func (o *output) set(attempt int, text string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.attempt, o.text = attempt, text
}

// serveLog makes a worker's queue answer for an output until the test's end.
func serveLog(t testing.TB, q *broker.Queue, o *output) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	var g errgroup.Group
	g.Go(func() error { return q.ServeLogs(ctx, o.read) })
	t.Cleanup(func() {
		cancel(nil)
		if err := g.Wait(); err != nil {
			t.Errorf("ServeLogs: %v", err)
		}
	})
}

// readLog follows an output and sends what it reads, and at last how it ended.
func readLog(ctx context.Context, c *broker.Client, operation string, parts chan<- string) error {
	for part, err := range c.Log(ctx, operation, broker.Stdout, 0, true) {
		if err != nil {
			return err
		}
		if part.Done != nil {
			parts <- fmt.Sprintf("done at %d", part.Offset)
			return nil
		}
		parts <- string(part.Data)
	}
	return errors.New("the log ended without the end of its operation")
}

func want(t testing.TB, parts <-chan string, wanted string) {
	t.Helper()
	select {
	case got := <-parts:
		if got != wanted {
			t.Fatalf("the log goes on with %.100q, want %.100q", got, wanted)
		}
	case <-time.After(20 * time.Second): //nolint:forbidigo // one timer per call
		t.Fatalf("the log does not go on, want %.100q", wanted)
	}
}

// A reader that comes while the operation is queued sees all that is written, part by part, over an
// attempt that failed, and leaves no trace.
func TestLogIsFollowedToItsEnd(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	first, second := brokertest.Queue(t, c, worker("w1")), brokertest.Queue(t, c, worker("w2"))
	one, two := new(output), new(output)
	serveLog(t, first, one)
	serveLog(t, second, two)
	operation := submit(t, c, broker.Request{Action: action(1)})
	parts := make(chan string, 10)
	var g errgroup.Group
	g.Go(func() error { return readLog(t.Context(), c, operation, parts) })

	l := begin(t, first)
	one.set(1, "one\n")
	want(t, parts, "one\n")
	one.set(1, "one\ntwo\n")
	want(t, parts, "two\n")
	one.set(0, "")
	if err := l.Return(t.Context(), "the test"); err != nil {
		t.Fatal(err)
	}
	l = begin(t, second)
	two.set(2, "one\n")
	two.set(2, "one\ntwo\nthree\n")
	want(t, parts, "three\n")
	two.set(0, "")
	settle(t, l, 0)
	want(t, parts, "done at 14")
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, farm)
}

// A long output comes in bounded parts, and without follow a reader gets what there is.
func TestLogOfWhatIsWritten(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	o := new(output)
	serveLog(t, q, o)
	operation := submit(t, c, broker.Request{Action: action(1)})
	for part, err := range c.Log(t.Context(), operation, broker.Stdout, 0, false) {
		t.Fatalf("a queued operation has %v, %v, want nothing", part, err)
	}
	l := begin(t, q)
	text := strings.Repeat("0123456789", 50_000)
	o.set(1, text)
	var read strings.Builder
	for part, err := range c.Log(t.Context(), operation, broker.Stdout, 7, false) {
		if err != nil || part.Offset != int64(7+read.Len()) || len(part.Data) > 64<<10 || part.Attempt != 1 {
			t.Fatalf("part at %d of %d bytes, %v", part.Offset, len(part.Data), err)
		}
		read.Write(part.Data)
	}
	if read.String() != text[7:] {
		t.Errorf("read %d bytes, want %d", read.Len(), len(text)-7)
	}
	settle(t, l, 0)
}

// Readers that leave while they wait for output are gone, also at the worker, which is then asked no more.
func TestLogReadersLeave(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	o := &output{attempt: 1}
	serveLog(t, q, o)
	operation := submit(t, c, broker.Request{Action: action(1)})
	l := begin(t, q)
	ctx, cancel := context.WithCancelCause(t.Context())
	left := errors.New("left")
	var g errgroup.Group
	for range 100 {
		g.Go(func() error {
			if err := readLog(ctx, c, operation, nil); !errors.Is(err, left) {
				return fmt.Errorf("a reader that leaves: %w", err)
			}
			return nil
		})
	}
	asked := func() int {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.asked
	}
	eventually(t, "questions", func() bool { return asked() > 200 })
	cancel(left)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	eventually(t, "silence", func() bool {
		before := asked()
		time.Sleep(200 * time.Millisecond) //nolint:forbidigo // silence takes time
		return asked() == before
	})
	settle(t, l, 0)
	nothingLeft(t, farm)
}

// A reader is nobody who waits for the operation: what only readers follow is cancelled, and what
// the action had written until then can be named after that, once.
func TestLogOfAnAbandonedOperation(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Abandoned: time.Second, Heartbeat: 200 * time.Millisecond})
	q := brokertest.Queue(t, c, worker("w1"))
	o := new(output)
	serveLog(t, q, o)
	operation := submit(t, c, broker.Request{Action: action(1)})
	l := begin(t, q)
	o.set(1, "written\n")
	parts := make(chan string, 10)
	var g errgroup.Group
	g.Go(func() error { return readLog(t.Context(), c, operation, parts) })
	want(t, parts, "written\n")
	if err := l.Guard(t.Context()); !errors.Is(err, broker.ErrCancelled) {
		t.Fatalf("Guard = %v, want ErrCancelled", err)
	}
	o.set(1, "written\nlast words\n")
	want(t, parts, "last words\n")
	stdout, stderr := space.Of([]byte("written\nlast words\n")), space.Of(nil)
	before := must(c.Get(t.Context(), operation))
	for range 2 { // an answer may be lost
		if err := l.KeepOutput(t.Context(), stdout, stderr); err != nil {
			t.Fatal(err)
		}
	}
	o.set(0, "")
	l.Drop(t.Context())
	want(t, parts, "done at 19")
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	op := must(c.Get(t.Context(), operation))
	if got, err := op.Output(broker.Stdout, nil); err != nil || got != stdout {
		t.Errorf("standard output is %v, %v, want %v", got, err, stdout)
	}
	if got, err := op.Output(broker.Stderr, nil); err != nil || got != stderr {
		t.Errorf("standard error is %v, %v, want %v", got, err, stderr)
	}
	if !proto.Equal(response(t, op), response(t, before)) || op.Note != before.Note || op.Stage != repb.ExecutionStage_COMPLETED {
		t.Errorf("the operation is %+v, want the terminal state that it had", op)
	}
	nothingLeft(t, farm)
}

// An operation that was not cancelled names its output in its response and nowhere else.
func TestKeepOutputOfOthers(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	l := begin(t, q)
	if err := l.KeepOutput(t.Context(), space.Of([]byte("x")), space.Of(nil)); err != nil {
		t.Fatal(err)
	}
	settle(t, l, 0)
	if err := l.KeepOutput(t.Context(), space.Of([]byte("x")), space.Of(nil)); err != nil {
		t.Fatal(err)
	}
	op := must(c.Get(t.Context(), operation))
	if got, err := op.Output(broker.Stdout, response(t, op)); err != nil || !got.IsZero() {
		t.Errorf("standard output is %v, %v, want none", got, err)
	}
}

// Log of what there is not.
func TestLogOfNothing(t *testing.T) {
	c := brokertest.Start(t).Client(t)
	for _, name := range []string{"", "nope", "a.>", strings.Repeat("A", 26)} {
		for part, err := range c.Log(t.Context(), name, broker.Stdout, 0, true) {
			if !errors.Is(err, broker.ErrNotFound) {
				t.Errorf("the log of %q = %v, %v, want ErrNotFound", name, part, err)
			}
		}
	}
}
