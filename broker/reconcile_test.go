package broker_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// reconciling is a client that looks for what was left undone all the time. Nothing else in these tests
// does: nobody watches before the end.
func reconciling(t testing.TB, farm *brokertest.Farm) *broker.Client {
	t.Helper()
	return farm.ClientWith(t, broker.Config{
		Reconcile: 50 * time.Millisecond, MendAfter: 100 * time.Millisecond, AckWait: 500 * time.Millisecond,
	})
}

// ended waits for an operation's end without watching it.
func ended(t testing.TB, c *broker.Client, operation string) *broker.Operation {
	t.Helper()
	var op *broker.Operation
	eventually(t, "the end of the operation", func() bool {
		op = must(c.Get(t.Context(), operation))
		return op.Done()
	})
	return op
}

// TestUnwatchedOperationWithoutJob: an operation that lost its job is queued again although nobody
// watches it, whether others may join it or not.
func TestUnwatchedOperationWithoutJob(t *testing.T) {
	for _, r := range []broker.Request{{Action: action(1)}, {Action: action(1), DoNotCache: true}} {
		farm := brokertest.Start(t)
		c := reconciling(t, farm)
		operation := submit(t, c, r)
		farm.Purge(t, "JOBS")
		q := brokertest.Queue(t, c, worker("w1"))
		settle(t, begin(t, q), 7)
		if got := response(t, ended(t, c, operation)).GetResult().GetExitCode(); got != 7 {
			t.Errorf("exit code %d, want 7", got)
		}
		nothingLeft(t, farm)
	}
}

// TestLeftOverJobAndFlight: job and flight of an operation that has ended, or was deleted, go although
// no worker comes.
func TestLeftOverJobAndFlight(t *testing.T) {
	farm := brokertest.Start(t)
	c := reconciling(t, farm)
	gone, done := submit(t, c, broker.Request{Action: action(1)}), submit(t, c, broker.Request{Action: action(2)})
	job := farm.All(t, "JOBS")[1]
	flight := farm.All(t, "FLIGHTS")[1]
	if err := c.Delete(t.Context(), gone); err != nil {
		t.Fatal(err)
	}
	if err := c.Cancel(t.Context(), done); err != nil {
		t.Fatal(err)
	}
	farm.Publish(t, job.Subject, job.Data) // as if they had not been removed
	farm.Publish(t, flight.Subject, flight.Data)
	eventually(t, "the flight of the ended operation is gone", func() bool { return farm.Messages(t, "FLIGHTS") == 1 })
	eventually(t, "the job of the ended operation is gone", func() bool { return farm.Messages(t, "JOBS") == 1 })
}

// TestConsumerIsMadeAgain: a pool whose consumers are gone is served again, and what waited and what
// ran comes to its end.
func TestConsumerIsMadeAgain(t *testing.T) {
	farm := brokertest.Start(t)
	c := reconciling(t, farm)
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Slots: 2})
	running := submit(t, c, broker.Request{Action: action(1)})
	l := begin(t, q)
	waiting := submit(t, c, broker.Request{Action: action(2)})
	js := must(jetstream.New(farm.Connect(t)))
	for lane := range 3 {
		if err := js.DeleteConsumer(t.Context(), "JOBS", "any-"+itoa(lane)); err != nil {
			t.Fatal(err)
		}
	}
	settle(t, l, 1)
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	var group errgroup.Group
	group.Go(func() error {
		return serve(ctx, q, func(l *broker.Lease) error { return l.Settle(ctx, outcome(2)) })
	})
	for operation, exit := range map[string]int32{running: 1, waiting: 2} {
		if got := response(t, ended(t, c, operation)).GetResult().GetExitCode(); got != exit {
			t.Errorf("exit code %d, want %d", got, exit)
		}
	}
	nothingLeft(t, farm)
	stop(nil)
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
}

// deliverOnce makes the consumers of a pool give a job up after its first delivery.
func deliverOnce(t testing.TB, farm *brokertest.Farm) {
	t.Helper()
	js := must(jetstream.New(farm.Connect(t)))
	for lane := range 3 {
		consumer := must(js.Consumer(t.Context(), "JOBS", "any-"+itoa(lane)))
		cfg := consumer.CachedInfo().Config
		cfg.MaxDeliver = 1
		if _, err := js.UpdateConsumer(t.Context(), "JOBS", cfg); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMaxDeliveriesEndTheOperation: a job that the broker gives up ends its operation and leaves the
// queue (audit hazard H11).
func TestMaxDeliveriesEndTheOperation(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{AckWait: 300 * time.Millisecond})
	operation := submit(t, c, broker.Request{Action: action(1)})
	deliverOnce(t, farm)
	next(t, c.Queue(worker("w1"))) // dies before it begins
	op := ended(t, c, operation)
	if got := statusCode(response(t, op)); got != code.Code_UNAVAILABLE {
		t.Errorf("status %v, want UNAVAILABLE", got)
	}
	if got := farm.Messages(t, "DEAD"); got != 1 {
		t.Errorf("%d letters, want 1", got)
	}
	nothingLeft(t, farm)
}

// TestUnheardMaxDeliveries: when nobody hears that the broker gives a job up, it is found, and runs.
func TestUnheardMaxDeliveries(t *testing.T) {
	farm := brokertest.Start(t)
	deaf := farm.Deaf(t, broker.Config{AckWait: 300 * time.Millisecond}) // it does not run
	operation := submit(t, deaf, broker.Request{Action: action(1)})
	busy := submit(t, deaf, broker.Request{Action: action(2)})
	deliverOnce(t, farm)
	q := deaf.Queue(broker.WorkerInfo{Name: "w1", Slots: 2})
	next(t, q) // dies before it begins
	l := begin(t, brokertest.Queue(t, deaf, worker("w2")))
	pauseFor(t, time.Second) // in which the broker says that it gives the job up
	c := reconciling(t, farm)
	again := begin(t, brokertest.Queue(t, c, worker("w3")))
	if got := again.Job().Operation; got != operation {
		t.Errorf("%s was queued again, want %s", got, operation)
	}
	settle(t, again, 0)
	settle(t, l, 0)
	for _, name := range []string{operation, busy} {
		if op := ended(t, c, name); statusCode(response(t, op)) != code.Code_OK || op.Attempt != 1 {
			t.Errorf("the operation is %+v", op)
		}
	}
	nothingLeft(t, farm)
}

// TestUnreadableJobAndRecord: what no process can read comes to an end.
func TestUnreadableJobAndRecord(t *testing.T) {
	farm := brokertest.Start(t)
	c := reconciling(t, farm)
	garbled := submit(t, c, broker.Request{Action: action(1)})
	job := farm.All(t, "JOBS")[0]
	farm.Purge(t, "JOBS")
	farm.Publish(t, job.Subject, []byte("garbage"))
	q := brokertest.Queue(t, c, worker("w1"))
	l := begin(t, q) // from the record
	settle(t, l, 3)
	if op := ended(t, c, garbled); response(t, op).GetResult().GetExitCode() != 3 {
		t.Errorf("the operation is %+v", op)
	}

	lost := submit(t, c, broker.Request{Action: action(2)})
	farm.Purge(t, "JOBS")
	farm.Publish(t, "jetfarm.op."+lost, []byte("garbage"))
	var op *broker.Operation
	eventually(t, "the end of the unreadable operation", func() bool {
		var err error
		op, err = c.Get(t.Context(), lost)
		return err == nil && op.Done()
	})
	if got := statusCode(response(t, op)); got != code.Code_INTERNAL {
		t.Errorf("status %v, want INTERNAL", got)
	}
	nothingLeft(t, farm)
}

// TestReconcilingCostsNoHistory: a turn asks for nothing of what is finished.
func TestReconcilingCostsNoHistory(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	asked := func(finished int) (requests int) {
		for n := range finished {
			submit(t, c, broker.Request{Action: action(n)})
			settle(t, begin(t, q), 0)
		}
		nothingLeft(t, farm)
		nc := farm.Connect(t)
		sub := must(nc.SubscribeSync("$JS.API.>"))
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := c.Reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		for {
			msg, err := sub.NextMsg(200 * time.Millisecond)
			if err != nil {
				return requests
			}
			if msg.Reply != "" {
				requests++
			}
		}
	}
	few, many := asked(1), asked(300)
	if many > few+5 { // a heartbeat may come in between
		t.Errorf("%d requests after one operation, %d after 300 more", few, many)
	}
}

// When nobody knows whether the record of an operation is stored, its flight stays: a record without a flight
// is found by nobody and would wait for days.
func TestFlightStaysWhenTheRecordMayBeThere(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Deaf(t, broker.Config{})
	js := must(jetstream.New(farm.Connect(t)))
	if err := js.DeleteStream(t.Context(), "OPERATIONS"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(t.Context(), broker.Request{Action: action(1)}); !errors.Is(err, broker.ErrUnavailable) {
		t.Errorf("Submit = %v, want ErrUnavailable", err)
	}
	if n := farm.Messages(t, "FLIGHTS"); n != 1 {
		t.Errorf("%d flights, want 1", n)
	}
}
