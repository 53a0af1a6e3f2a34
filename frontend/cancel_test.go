package frontend_test

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// waiting executes an action and returns the stream and the name that it was given.
func (h *harness) waiting(t testing.TB, action digest.Digest) (operationStream, string) {
	t.Helper()
	stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	op, _ := recv(t, stream)
	return stream, op.GetName()
}

func (h *harness) cancel(ctx context.Context, name string) error {
	_, err := h.ops.CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: name})
	return err
}

func (h *harness) mustCancel(t testing.TB, name string) {
	t.Helper()
	if err := h.cancel(t.Context(), name); err != nil {
		t.Fatalf("CancelOperation(%s): %v", name, err)
	}
}

// ended is the response of a done operation as GetOperation gives it, or nil for one that goes on.
func (h *harness) ended(t testing.TB, name string) *repb.ExecuteResponse {
	t.Helper()
	op, err := h.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: name})
	if err != nil || op.GetName() != name {
		t.Fatalf("GetOperation(%s) = %v, %v", name, op, err)
	}
	if !op.GetDone() {
		return nil
	}
	return responseOf(t, op)
}

// wantCancelled checks that each frontend says of a name that it was cancelled, as the stream did.
func wantCancelled(t testing.TB, got *repb.ExecuteResponse, action digest.Digest, name string, frontends ...*harness) {
	t.Helper()
	if codes.Code(got.GetStatus().GetCode()) != codes.Canceled {
		t.Fatalf("the stream of who cancelled ended with %v, want CANCELLED", got)
	}
	for i, h := range frontends {
		if diff := diffMessages(got, h.ended(t, name)); diff != "" {
			t.Errorf("frontend %d, GetOperation differs from the stream (-stream +got):\n%s", i, diff)
		}
		again, waited := finish(t, h.wait(t, name), action)
		if diff := diffMessages(got, again); diff != "" || waited != name {
			t.Errorf("frontend %d, WaitExecution differs from the stream (-stream +got):\n%s", i, diff)
		}
	}
}

// guard tells when the lease is over.
func guard(t testing.TB, lease *broker.Lease) (ended <-chan error, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- lease.Guard(ctx) }()
	return result, func() { cancel(); <-result }
}

// One of two clients whose equal actions are one operation cancels: the other one's goes on, at any frontend, and
// what each was told stays.
func TestX_111_LRO_3_OneOfSeveralWaitersCancels(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	q := h.queue(t)
	h.farm.Messages(t, "JOBS") // connects for as long as this test
	for stage, frontends := range map[string][2]*harness{"queued": {h, other}, "executing": {other, h}} {
		t.Run(stage, func(t *testing.T) {
			action := h.action(t)
			leaves, leaver := frontends[0].waiting(t, action)
			stays, stayer := frontends[1].waiting(t, action)
			if leaver == stayer {
				t.Fatalf("both clients were given the name %s", leaver)
			}
			again := frontends[1].wait(t, leaver)
			recv(t, again)
			if n := h.farm.Messages(t, "JOBS"); n != 1 {
				t.Fatalf("%d jobs, want one for both", n)
			}
			var lease *broker.Lease
			if stage == "executing" {
				lease = begin(t, q)
			}
			frontends[1].mustCancel(t, leaver)
			got, _ := finish(t, leaves, action)
			wantCancelled(t, got, action, leaver, h, other)
			if got, _ := finish(t, again, action); codes.Code(got.GetStatus().GetCode()) != codes.Canceled {
				t.Errorf("another stream of who cancelled ended with %v", got)
			}
			h.mustCancel(t, leaver) // again, which changes nothing

			if lease == nil {
				lease = begin(t, q)
			}
			over, stop := guard(t, lease)
			if response := other.ended(t, stayer); response != nil {
				t.Fatalf("who did not cancel is told %v", response)
			}
			select {
			case err := <-over:
				t.Fatalf("the action is over for its worker: %v", err)
			default:
				stop()
			}
			settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 4}})
			if got, name := finish(t, stays, action); got.GetResult().GetExitCode() != 4 || name != stayer {
				t.Errorf("who did not cancel is told %v of %s", got, name)
			}
			for _, name := range []string{stayer, broker.OperationOf(stayer)} {
				if response := h.ended(t, name); response.GetResult().GetExitCode() != 4 {
					t.Errorf("GetOperation(%s) = %v", name, response)
				}
			}
			wantCancelled(t, got, action, leaver, h, other)
		})
	}
}

// The action is killed within two seconds when all have cancelled, and when the operator cancels for all.
func TestX_111_LRO_3_LastWaiterCancels(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	q := h.queue(t)
	h.farm.Messages(t, "JOBS") // connects for as long as this test
	for who, test := range map[string]struct {
		clients int
		cancels func(names []string) []string
	}{
		"the only one": {1, func(names []string) []string { return names }},
		"all":          {5, func(names []string) []string { return names }},
		"an operator":  {3, func(names []string) []string { return []string{broker.OperationOf(names[1])} }},
	} {
		t.Run(who, func(t *testing.T) {
			action := h.action(t)
			streams, names := make([]operationStream, test.clients), make([]string, test.clients)
			for i := range streams {
				streams[i], names[i] = []*harness{h, other}[i%2].waiting(t, action)
			}
			lease := begin(t, q)
			over, _ := guard(t, lease)
			cancels := test.cancels(names)
			for i, name := range cancels {
				select {
				case err := <-over:
					t.Fatalf("the action is over after %d of %d cancels: %v", i, len(cancels), err)
				default:
				}
				[]*harness{other, h}[i%2].mustCancel(t, name)
			}
			within(t, "the end for the worker", func() {
				if err := <-over; !errors.Is(err, broker.ErrCancelled) {
					t.Errorf("Guard = %v, want ErrCancelled", err)
				}
			})
			lease.Drop(t.Context())
			for i, stream := range streams {
				got, _ := finish(t, stream, action)
				wantCancelled(t, got, action, names[i], h, other)
			}
			eventually(t, "no job and no flight", func() bool { return h.farm.Messages(t, "JOBS")+h.farm.Messages(t, "FLIGHTS") == 0 })
		})
	}
}

// A client that is between two streams, as when its frontend has died, finds its operation although the only
// other one has cancelled meanwhile; when nobody comes back it is cancelled as every one that was left.
func TestX_111_OPS_10_WhoHasLeftMayComeBack(t *testing.T) {
	farm := brokertest.Start(t)
	soon := func(c *frontend.Config) {
		c.Broker = farm.ClientWith(t, broker.Config{Abandoned: 500 * time.Millisecond})
	}
	h, other := startOn(t, farm, soon), startOn(t, farm)
	action := h.action(t)
	leaving, leave := context.WithCancelCause(t.Context())
	away := other.execute(leaving, t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	op, _ := recv(t, away)
	stream, name := h.waiting(t, action)
	leave(errors.New("the connection broke"))
	eventually(t, "one watcher", func() bool { return farm.Subscriptions(t, "jetfarm.status.") == 1 })
	h.mustCancel(t, name)
	finish(t, stream, action)
	back := other.wait(t, op.GetName())
	if first, _ := recv(t, back); first.GetDone() {
		t.Fatalf("who comes back is told %v", responseOf(t, first))
	}
	other.mustCancel(t, op.GetName())
	finish(t, back, action)

	action = h.action(t)
	leaving, leave = context.WithCancelCause(t.Context())
	recv(t, other.execute(leaving, t, &repb.ExecuteRequest{ActionDigest: action.Proto()}))
	stream, name = h.waiting(t, action)
	leave(errors.New("gone for good"))
	h.mustCancel(t, name)
	finish(t, stream, action)
	eventually(t, "the end of an operation that everybody has left", func() bool { return h.ended(t, broker.OperationOf(name)) != nil })
}

// Whatever is first, the action's end or the cancel of one waiter: each name has one end, and the waiter that has not
// cancelled gets the result.
func TestX_111_X_110_CancelOfOneRacesTheEnd(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	q := h.queue(t)
	ends := map[codes.Code]int{}
	for i := range 40 {
		action := h.action(t)
		leaves, leaver := h.waiting(t, action)
		stays, _ := other.waiting(t, action)
		lease := begin(t, q)
		var g errgroup.Group
		g.Go(func() error {
			if i%3 == 0 {
				runtime.Gosched()
			}
			return other.cancel(t.Context(), leaver)
		})
		g.Go(func() error {
			return lease.Settle(t.Context(), broker.Outcome{Response: encode(&repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 3}})})
		})
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		if got, _ := finish(t, stays, action); got.GetResult().GetExitCode() != 3 {
			t.Fatalf("who did not cancel is told %v", got)
		}
		got, _ := finish(t, leaves, action)
		for _, at := range []*harness{h, other} {
			if diff := diffMessages(got, at.ended(t, leaver)); diff != "" {
				t.Fatalf("GetOperation differs from the stream (-stream +got):\n%s", diff)
			}
		}
		ends[codes.Code(got.GetStatus().GetCode())]++
	}
	t.Logf("ends: %v", ends)
}

// Who executes while the only waiter of an equal action cancels gets a result, whichever is first.
func TestX_111_JoinRacesTheCancelOfTheOnlyWaiter(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	q := h.queue(t)
	joined := 0
	for range 40 {
		action := h.action(t)
		leaves, leaver := h.waiting(t, action)
		var stays operationStream
		var stayer string
		var g errgroup.Group
		g.Go(func() error { return h.cancel(t.Context(), leaver) })
		stays, stayer = other.waiting(t, action)
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		got, _ := finish(t, leaves, action)
		wantCancelled(t, got, action, leaver, h, other)
		if broker.OperationOf(stayer) == broker.OperationOf(leaver) {
			joined++
		}
		settle(t, begin(t, q), &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 2}})
		if got, _ := finish(t, stays, action); got.GetResult().GetExitCode() != 2 {
			t.Fatalf("who did not cancel is told %v", got)
		}
	}
	t.Logf("%d joined", joined)
}

// When no state of an operation arrives any more, as over a connection that loses messages, the heartbeat brings
// what was cancelled.
func TestX_111_HeartbeatBringsTheCancel(t *testing.T) {
	farm := brokertest.Start(t)
	quick := func(c *frontend.Config) {
		c.Broker = farm.ClientWith(t, broker.Config{Heartbeat: 200 * time.Millisecond})
	}
	h, other := startOn(t, farm, quick), startOn(t, farm, quick)
	stream, err := h.js.Stream(t.Context(), "OPERATIONS")
	if err != nil {
		t.Fatal(err)
	}
	mute := stream.CachedInfo().Config
	mute.RePublish = &jetstream.RePublish{Source: mute.RePublish.Source, Destination: "lost.{{wildcard(1)}}"}
	action := h.action(t)
	leaves, leaver := h.waiting(t, action)
	stays, stayer := other.waiting(t, action)
	if _, err := h.js.UpdateStream(t.Context(), mute); err != nil {
		t.Fatal(err)
	}
	other.mustCancel(t, leaver)
	got, _ := finish(t, leaves, action)
	wantCancelled(t, got, action, leaver, h, other)
	if response := h.ended(t, stayer); response != nil {
		t.Errorf("who did not cancel is told %v", response)
	}
	h.mustCancel(t, stayer)
	finish(t, stays, action)
}

// More waiters than a record lists: each cancels for itself, and who does not gets the result.
func TestX_111_X_106_ManyWaitersCancel(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	q := h.queue(t)
	action := h.action(t)
	const clients = 40
	streams, names := make([]operationStream, clients), make([]string, clients)
	var g errgroup.Group
	for i := range clients {
		g.Go(func() error {
			var err error
			if streams[i].ServerStreamingClient, err = []*harness{h, other}[i%2].exec.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: action.Proto()}); err != nil {
				return err
			}
			op, err := streams[i].Recv()
			names[i] = op.GetName()
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	lease := begin(t, q)
	for _, name := range names[1:] {
		g.Go(func() error { return other.cancel(t.Context(), name) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for i := range clients - 1 {
		if got, _ := finish(t, streams[i+1], action); codes.Code(got.GetStatus().GetCode()) != codes.Canceled {
			t.Fatalf("waiter %d is told %v", i+1, got)
		}
	}
	settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 6}})
	if got, _ := finish(t, streams[0], action); got.GetResult().GetExitCode() != 6 {
		t.Errorf("who did not cancel is told %v", got)
	}
}

// A name with the operation of another one and a waiter that nobody was given is found nowhere.
func TestX_111_X_107_WaitersThatAreNone(t *testing.T) {
	h := start(t)
	stream, name := h.waiting(t, h.action(t))
	operation := broker.OperationOf(name)
	for _, unknown := range []string{
		operation + "-", operation + "-AAAAAAAAAAAAA", name + "A", name[:len(name)-1], strings.ToLower(name), name + "-AAAAAAAAAAAAA",
		operation + "-AAAAAAAAAAAA.", operation + "-AAAAAAAAAAAA>", operation + "-" + strings.Repeat("A", 1<<20), "-" + name,
	} {
		_, err := h.wait(t, unknown).Recv()
		wantCode(t, "WaitExecution", err, codes.NotFound)
		_, err = h.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: unknown})
		wantCode(t, "GetOperation", err, codes.NotFound)
		wantCode(t, "CancelOperation", h.cancel(t.Context(), unknown), codes.NotFound)
		_, err = h.ops.DeleteOperation(t.Context(), &longrunningpb.DeleteOperationRequest{Name: unknown})
		wantCode(t, "DeleteOperation", err, codes.NotFound)
	}
	if response := h.ended(t, name); response != nil {
		t.Errorf("the operation ended: %v", response)
	}
	_ = stream
}
