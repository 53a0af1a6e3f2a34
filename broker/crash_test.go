package broker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// history is every state that a farm has stored.
type history struct {
	mu   sync.Mutex
	ends map[string][]string // guarded by mu; the terminal states of operations
	seen map[string]bool     // guarded by mu
}

func record(t testing.TB, farm *brokertest.Farm) *history {
	t.Helper()
	h := &history{ends: map[string][]string{}, seen: map[string]bool{}}
	nc := farm.Connect(t)
	_, err := nc.Subscribe("jetfarm.status.*", func(m *nats.Msg) {
		if m.Reply != "" { // somebody asks who watches
			return
		}
		line, response, _ := strings.Cut(string(m.Data), "\n")
		var state struct{ Stage repb.ExecutionStage_Value }
		if err := json.Unmarshal([]byte(line), &state); err != nil {
			t.Errorf("unreadable state: %v", err)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		operation := strings.TrimPrefix(m.Subject, "jetfarm.status.")
		h.seen[operation] = true
		if state.Stage == repb.ExecutionStage_COMPLETED {
			h.ends[operation] = append(h.ends[operation], response)
		}
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// check waits until every operation that was ever recorded has ended and nothing is left, and checks that
// each has ended once. It returns their names.
func (h *history) check(t testing.TB, farm *brokertest.Farm) []string {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		h.mu.Lock()
		open := len(h.seen) - len(h.ends)
		h.mu.Unlock()
		if open == 0 && farm.Messages(t, "JOBS") == 0 && farm.Messages(t, "FLIGHTS") == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after 30 s %d operations are open, %d jobs and %d flights are left", open, farm.Messages(t, "JOBS"), farm.Messages(t, "FLIGHTS"))
		}
		pauseFor(t, 20*time.Millisecond)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var names []string
	for operation, ends := range h.ends {
		names = append(names, operation)
		if len(ends) != 1 {
			t.Errorf("operation %s has ended %d times: %q", operation, len(ends), ends)
		}
	}
	slices.Sort(names)
	return names
}

// survivors are a frontend and a worker that nothing happens to. The worker ends what it gets with the exit
// code 2.
func survivors(t *testing.T, farm *brokertest.Farm) *broker.Client {
	t.Helper()
	c := farm.ClientWith(t, broker.Config{
		Reconcile: 100 * time.Millisecond, MendAfter: 300 * time.Millisecond, AckWait: 500 * time.Millisecond, Heartbeat: 200 * time.Millisecond,
	})
	q := brokertest.Queue(t, c, worker("survivor"))
	ctx, stop := context.WithCancelCause(t.Context())
	var group errgroup.Group
	group.Go(func() error {
		return serve(ctx, q, func(l *broker.Lease) error { return l.Settle(ctx, outcome(2)) })
	})
	t.Cleanup(func() {
		stop(nil)
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// moment is one at which a process dies: before or after a message to a subject has arrived.
type moment struct {
	subject string
	after   bool
}

func (m moment) String() string {
	when := "before "
	if m.after {
		when = "after "
	}
	return when + m.subject
}

func moments(subjects ...string) (all []moment) {
	for _, s := range subjects {
		all = append(all, moment{s, false}, moment{s, true})
	}
	return all
}

// TestDeathWhileSubmitting: a process that dies at any moment of a submission leaves an operation that
// ends once or none at all, although nobody asks for it; and an equal request runs.
func TestDeathWhileSubmitting(t *testing.T) {
	t.Parallel()
	for _, m := range moments("jetfarm.flight.", "jetfarm.op.", "jetfarm.job.") {
		for _, again := range []bool{false, true} {
			t.Run(fmt.Sprint(m, ", again ", again), func(t *testing.T) {
				t.Parallel()
				farm := brokertest.Start(t)
				h := record(t, farm)
				cutter := farm.Cutter(t)
				dies := cutter.Client(t, farm, broker.Config{AckWait: 500 * time.Millisecond})
				c := survivors(t, farm)
				cutter.Arm(m.subject, m.after)
				ctx, kill := context.WithCancelCause(t.Context())
				var group errgroup.Group
				group.Go(func() error {
					if _, err := dies.Submit(ctx, broker.Request{Action: action(1)}); err == nil {
						t.Errorf("the submission has survived its process")
					}
					return nil
				})
				<-cutter.Cut()
				kill(nil)
				if again {
					operation := submit(t, c, broker.Request{Action: action(1)})
					if got := response(t, terminal(t, c, operation)).GetResult().GetExitCode(); got != 2 {
						t.Errorf("exit code %d", got)
					}
				}
				if err := group.Wait(); err != nil {
					t.Error(err)
				}
				names := h.check(t, farm)
				recorded := m.subject == "jetfarm.job." || m.subject == "jetfarm.op." && m.after
				if least := btoi(recorded || again); len(names) < least || len(names) > 1+btoi(again) {
					t.Errorf("operations %v have ended", names)
				}
				ran := 0
				for _, name := range names {
					r := response(t, must(c.Get(t.Context(), name)))
					switch statusCode(r) {
					case code.Code_OK:
						ran++
					case code.Code_UNAVAILABLE: // took the place of a record that might have come late
					default:
						t.Errorf("the operation has ended as %v", r)
					}
				}
				if ran < btoi(recorded || again) {
					t.Errorf("%d operations of %v have run", ran, names)
				}
			})
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestDeathWhileSettling: a worker that dies at any moment of an attempt leaves an operation that ends
// once, with its own outcome if that was stored and else with that of another worker.
func TestDeathWhileSettling(t *testing.T) {
	t.Parallel()
	for _, m := range append(moments("jetfarm.op.", "$JS.API.STREAM.MSG.DELETE.FLIGHTS", "$JS.ACK."), moment{"begin", false}, moment{"begin", true}) {
		for _, cacheable := range []bool{true, false} {
			t.Run(fmt.Sprint(m, ", cacheable ", cacheable), func(t *testing.T) {
				t.Parallel()
				farm := brokertest.Start(t)
				h := record(t, farm)
				cutter := farm.Cutter(t)
				dies := cutter.Client(t, farm, broker.Config{AckWait: 500 * time.Millisecond})
				q := dies.Queue(worker("dies")) // it does not run, so it renews nothing
				operation := submit(t, farm.Deaf(t, broker.Config{AckWait: 500 * time.Millisecond}), broker.Request{Action: action(1), DoNotCache: !cacheable})
				var l *broker.Lease
				if m.subject == "begin" {
					l = next(t, q)
					cutter.Arm("jetfarm.op.", m.after)
				} else {
					l = begin(t, q)
					cutter.Arm(m.subject, m.after)
				}
				var group errgroup.Group
				group.Go(func() error {
					if m.subject == "begin" {
						if err := l.Begin(t.Context()); err == nil {
							t.Error("the lease has begun")
						}
						return nil
					}
					// What it is told of the end matters to nobody.
					_ = l.Settle(t.Context(), outcome(1)) //nolint:errcheck // see above
					return nil
				})
				<-cutter.Cut()
				c := survivors(t, farm)
				names := h.check(t, farm)
				if len(names) != 1 || names[0] != operation {
					t.Errorf("operations %v have ended, want %s", names, operation)
				}
				want := int32(1)
				if m.subject == "begin" || m.subject == "jetfarm.op." && !m.after {
					want = 2
				}
				op := must(c.Get(t.Context(), operation))
				if got := response(t, op).GetResult().GetExitCode(); got != want {
					t.Errorf("exit code %d, want %d", got, want)
				}
				if lost := btoi(m.subject == "begin" && m.after || m.subject == "jetfarm.op." && !m.after); len(op.Failures) != lost {
					t.Errorf("failures %+v, want %d", op.Failures, lost)
				}
				if err := group.Wait(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestDeathWhileBurying: a process that dies between the letter and the end of its operation leaves one
// letter and one end.
func TestDeathWhileBurying(t *testing.T) {
	t.Parallel()
	for _, m := range moments("jetfarm.dead.", "jetfarm.op.", "$JS.API.STREAM.MSG.DELETE.FLIGHTS", "$JS.ACK.") {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			farm := brokertest.Start(t)
			h := record(t, farm)
			cutter := farm.Cutter(t)
			dies := cutter.Client(t, farm, broker.Config{AckWait: 500 * time.Millisecond})
			q := dies.Queue(worker("dies"))
			operation := submit(t, farm.Deaf(t, broker.Config{AckWait: 500 * time.Millisecond}), broker.Request{Action: action(1)})
			for range broker.MaxAttempts - 1 {
				if err := begin(t, q).Return(t.Context(), "trouble"); err != nil {
					t.Fatal(err)
				}
			}
			l := begin(t, q)
			cutter.Arm(m.subject, m.after)
			var group errgroup.Group
			group.Go(func() error {
				_ = l.Return(t.Context(), "trouble") //nolint:errcheck // it is dead
				return nil
			})
			<-cutter.Cut()
			c := survivors(t, farm)
			h.check(t, farm)
			op := must(c.Get(t.Context(), operation))
			if statusCode(response(t, op)) != code.Code_UNAVAILABLE || len(op.Failures) != broker.MaxAttempts {
				t.Errorf("the operation is %+v", op)
			}
			if letters, _, err := c.Dead(t.Context(), 9); err != nil || len(letters) != 1 || letters[0].Name != operation {
				t.Errorf("letters %+v, %v", letters, err)
			}
			if err := group.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}
