package frontend_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

func TestWAIT_3_X_107_UnknownNames(t *testing.T) {
	h := start(t)
	for _, unknown := range []string{"", "nope", "a/b", "*", ">", "a.b", strings.Repeat("A", 26), strings.Repeat("x", 1<<20), "cached-" + strings.Repeat("A", 26)} {
		_, err := h.wait(t, unknown).Recv()
		wantCode(t, fmt.Sprintf("WaitExecution(%.30q)", unknown), err, codes.NotFound)
	}
}

// Row WAIT-7: many waiters on one operation, of several frontends, all see the end.
func TestWAIT_7_X_106_ManyWaiters(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	q := h.queue(t)
	action := h.action(t)
	stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	op, _ := recv(t, stream)
	var g errgroup.Group
	for i := range 100 {
		waiter := []*harness{h, other}[i%2].wait(t, op.GetName())
		recv(t, waiter)
		g.Go(func() error {
			for {
				op, err := waiter.Recv()
				if err != nil || op.GetDone() {
					return err
				}
			}
		})
	}
	settle(t, begin(t, q), &repb.ExecuteResponse{Result: &repb.ActionResult{}})
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	finish(t, stream, action)
}

// Audit row P7: whatever happens, a stream ends with exactly one done operation or a status.
func TestExecute_AlwaysTerminalOnce(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	run := func(t *testing.T) (operationStream, digest.Digest, string) {
		t.Helper()
		action := h.action(t)
		stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
		op, _ := recv(t, stream)
		return stream, action, op.GetName()
	}
	t.Run("EXR-18 LRO-3 cancelled while queued", func(t *testing.T) {
		stream, action, name := run(t)
		if _, err := h.ops.CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: name}); err != nil {
			t.Fatalf("CancelOperation: %v", err)
		}
		if got, _ := finish(t, stream, action); codes.Code(got.GetStatus().GetCode()) != codes.Canceled { // row EXR-18
			t.Errorf("status %v, want CANCELLED", got.GetStatus())
		}
	})
	t.Run("EXR-18 cancelled while it runs", func(t *testing.T) {
		stream, action, name := run(t)
		lease := begin(t, q)
		if err := h.broker.Cancel(t.Context(), name); err != nil {
			t.Fatalf("Cancel: %v", err)
		}
		if err := lease.Guard(t.Context()); !errors.Is(err, broker.ErrCancelled) {
			t.Errorf("Guard = %v, want ErrCancelled", err)
		}
		if err := lease.Settle(t.Context(), broker.Outcome{}); !errors.Is(err, broker.ErrLost) {
			t.Errorf("Settle = %v, want ErrLost", err)
		}
		if got, _ := finish(t, stream, action); codes.Code(got.GetStatus().GetCode()) != codes.Canceled {
			t.Errorf("status %v, want CANCELLED", got.GetStatus())
		}
	})
	t.Run("OPS-4 returned and run again", func(t *testing.T) {
		stream, action, _ := run(t)
		if err := begin(t, q).Return(t.Context(), "the worker is draining"); err != nil {
			t.Fatalf("Return: %v", err)
		}
		settle(t, begin(t, q), &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 2}})
		if got, _ := finish(t, stream, action); got.GetResult().GetExitCode() != 2 {
			t.Errorf("response %v", got)
		}
	})
	t.Run("failed", func(t *testing.T) {
		stream, action, _ := run(t)
		timedOut := &repb.ExecuteResponse{
			Status: status.New(codes.DeadlineExceeded, "execution timeout exceeded").Proto(), Result: &repb.ActionResult{ExitCode: 124},
		}
		settle(t, begin(t, q), timedOut)
		if got, _ := finish(t, stream, action); diffMessages(timedOut, got) != "" { // decision D8
			t.Errorf("response %v, want %v", got, timedOut)
		}
	})
	t.Run("deleted", func(t *testing.T) {
		short := h.farm.ClientWith(t, broker.Config{Heartbeat: 100 * time.Millisecond})
		other := startOn(t, h.farm, func(c *frontend.Config) { c.Broker = short })
		action := other.action(t)
		stream := other.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
		op, _ := recv(t, stream)
		if _, err := other.ops.DeleteOperation(t.Context(), &longrunningpb.DeleteOperationRequest{Name: op.GetName()}); err != nil {
			t.Fatalf("DeleteOperation: %v", err)
		}
		var err error
		for err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, "Execute of a deleted operation", err, codes.Unavailable)
		_, err = other.wait(t, op.GetName()).Recv()
		wantCode(t, "WaitExecution of a deleted operation", err, codes.NotFound)
	})
}

// Row OPS-5: a stream on which nothing happens is not silent.
func TestOPS_5_EXA_24_Heartbeat(t *testing.T) {
	farm := brokertest.Start(t)
	quick := farm.ClientWith(t, broker.Config{Heartbeat: 50 * time.Millisecond})
	h := startOn(t, farm, func(c *frontend.Config) { c.Broker = quick })
	stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()})
	within(t, "five messages", func() {
		for range 5 {
			if _, meta := recv(t, stream); meta.GetStage() != repb.ExecutionStage_QUEUED {
				t.Errorf("metadata %v, want QUEUED", meta)
			}
		}
	})
}

// Audit rows 10 and 19, row X-109: a thousand clients that vanish leave nothing.
func TestX_109_ThousandDisconnects(t *testing.T) {
	h := start(t)
	h.warm(t)
	// The pool and its consumers are made by its first action.
	first, cancelFirst := context.WithCancelCause(t.Context())
	recv(t, h.execute(first, t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()}))
	cancelFirst(errors.New("gone"))
	eventually(t, "no handler left", func() bool { return handlers() == 0 })
	consumers := h.consumers(t)
	subscriptions := h.farm.Subscriptions(t, "")

	actions := make([]digest.Digest, 1000)
	for i := range actions {
		actions[i] = h.action(t)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	var g errgroup.Group
	g.SetLimit(64)
	for i, action := range actions {
		g.Go(func() error {
			stream, err := h.exec.Execute(ctx, &repb.ExecuteRequest{ActionDigest: action.Proto()})
			if err == nil && i%2 == 0 { // the others leave before they hear anything
				_, err = stream.Recv()
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	cancel(errors.New("gone"))
	within(t, "the end of the handlers", func() {
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
	eventually(t, "no subscription to a status", func() bool { return h.farm.Subscriptions(t, "jetfarm.status.") == 0 })
	eventually(t, "no subscription left", func() bool { return h.farm.Subscriptions(t, "") <= subscriptions })
	if got := h.consumers(t); got != consumers {
		t.Errorf("%d consumers, want %d as before", got, consumers)
	}
}

// Names of operations tell nothing about each other.
func TestX_108_NamesCannotBeGuessed(t *testing.T) {
	h := start(t)
	const length = 26 + 1 + 13 // the operation's and the waiter's, see docs/PROTOCOL.md
	seen, letters := map[string]bool{}, [length]map[byte]bool{}
	for range 200 {
		op, _ := recv(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()}))
		name := op.GetName()[strings.LastIndexByte(op.GetName(), '/')+1:]
		if seen[name] || len(name) != length || name[26] != '-' {
			t.Fatalf("name %q, want %d characters that are new", name, length)
		}
		seen[name] = true
		for i := range letters {
			if letters[i] == nil {
				letters[i] = map[byte]bool{}
			}
			letters[i][name[i]] = true
		}
	}
	for i, different := range letters { // of 200 random ones of 32 nearly all are there; chance leaves out ten about never
		if len(different) < 22 && i != 26 {
			t.Errorf("character %d has %d values in 200 names", i, len(different))
		}
	}
}

// A cancel and the end of the action at once: there is one end, which everybody sees.
func TestX_110_CancelRacesTheEnd(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	q := h.queue(t)
	ends := map[codes.Code]int{}
	for i := range 60 {
		action := h.action(t)
		stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
		op, _ := recv(t, stream)
		lease := begin(t, q)
		var g errgroup.Group
		g.Go(func() error {
			if i%3 == 0 {
				runtime.Gosched()
			}
			_, err := h.ops.CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: op.GetName()})
			return err
		})
		g.Go(func() error {
			err := lease.Settle(t.Context(), broker.Outcome{Response: encode(&repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 3}})})
			if errors.Is(err, broker.ErrLost) {
				lease.Drop(t.Context())
				return nil
			}
			return err
		})
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		got, name := finish(t, stream, action)
		again, _ := finish(t, other.wait(t, name), action)
		code := codes.Code(got.GetStatus().GetCode())
		if diff := diffMessages(got, again); diff != "" || code == codes.OK && got.GetResult().GetExitCode() != 3 || code != codes.OK && code != codes.Canceled {
			t.Fatalf("Execute = %v, WaitExecution differs by (-first +second):\n%s", got, diff)
		}
		ends[code]++
	}
	t.Logf("ends: %v", ends)
}
