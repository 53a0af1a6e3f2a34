package broker_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// What an operator sees: what waits, what runs, and why.
func TestOperatorsSeeTheQueue(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	first := submit(t, c, broker.Request{Action: action(1)})
	if got := c.Why(must(c.Get(t.Context(), first)), 0); !strings.Contains(got, "there is none") {
		t.Errorf("without a worker: %q", got)
	}
	q := brokertest.Queue(t, c, worker("w1"))
	second := submit(t, c, broker.Request{Action: action(2)})
	urgent := submit(t, c, broker.Request{Action: action(3), Priority: -1})
	l := begin(t, q)

	eventually(t, "registration of the worker", func() bool { return len(c.Workers()) == 1 })
	viewer := attach(t, farm)
	ops, more, err := viewer.Active(t.Context(), 10)
	if err != nil || more || len(ops) != 3 || ops[0].Name != first || ops[1].Name != second || ops[2].Name != urgent {
		t.Errorf("Active = %+v, %v, %v", ops, more, err)
	}
	if ops, more, err := viewer.Active(t.Context(), 2); err != nil || !more || len(ops) != 2 {
		t.Errorf("Active(2) = %d operations, %v, %v", len(ops), more, err)
	}
	running := must(viewer.Get(t.Context(), l.Job().Operation))
	if got := viewer.Why(running, 0); got != "runs on w1" {
		t.Errorf("a running operation: %q", got)
	}
	pools := must(viewer.Pools(t.Context()))
	if len(pools) != 1 || pools[0].Workers != 1 || pools[0].Slots != 1 || pools[0].Waiting[1]+pools[0].Waiting[0] != 2 || pools[0].Running[0]+pools[0].Running[1] != 1 {
		t.Errorf("Pools = %+v", pools)
	}
	settle(t, l, 0)
}

// attach returns a client of an operator, who starts nothing.
// TestOperatorsSeeWhatIsHeld: it is counted, and says that it waits for its turn.
func TestOperatorsSeeWhatIsHeld(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	brokertest.Queue(t, c, worker("w1"))
	for i := range 50 {
		submit(t, c, build("a", i))
	}
	viewer := attach(t, farm)
	pool := must(viewer.Pools(t.Context()))[0]
	in := 0
	for _, n := range pool.Waiting {
		in += n
	}
	if pool.Held == 0 || in+pool.Held != 50 {
		t.Errorf("%d operations are in lanes and %d are held, want 50 in all", in, pool.Held)
	}
	ops, more, err := viewer.Active(t.Context(), 100)
	if err != nil || more || len(ops) != 50 {
		t.Fatalf("Active = %d operations, %v, %v, want 50", len(ops), more, err)
	}
	if got := viewer.Why(ops[49], 0); !strings.Contains(got, "turn") {
		t.Errorf("the last one waits because %q, want for its turn", got)
	}
}

func attach(t *testing.T, farm *brokertest.Farm) *broker.Client {
	t.Helper()
	c, err := broker.New(broker.Config{Conn: farm.Connect(t), Log: farm.Log()})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Attach(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAttachNeedsAFarm(t *testing.T) {
	farm := brokertest.Start(t)
	c := must(broker.New(broker.Config{Conn: farm.Connect(t), Log: farm.Log()}))
	if err := c.Attach(t.Context()); !errors.Is(err, broker.ErrNoFarm) {
		t.Errorf("Attach to an empty server = %v, want ErrNoFarm", err)
	}
	if streams := farm.Streams(t); len(streams) > 0 {
		t.Errorf("Attach made %v", streams)
	}
}

// A drained worker finishes what it runs and takes nothing, until it is undrained.
func TestDrainedWorkerTakesNoJobs(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, farm.Client(t), broker.WorkerInfo{Name: "w1", Slots: 2})
	running := submit(t, c, broker.Request{Action: action(1)})
	l := begin(t, q)

	viewer := attach(t, farm)
	info, err := viewer.DrainWorker(t.Context(), "w1", true)
	if err != nil || !info.Draining || info.Busy != 1 {
		t.Fatalf("DrainWorker = %+v, %v", info, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	leases := make(chan *broker.Lease, 1)
	var taking errgroup.Group
	taking.Go(func() error {
		next, err := q.Next(ctx)
		if err == nil {
			leases <- next
		}
		return err
	})
	waiting := submit(t, c, broker.Request{Action: action(2)})
	settle(t, l, 0)
	terminal(t, c, running)
	// An idle worker hears of a job at once, so by the time that a whole operation has passed by another
	// worker, the drained one would have taken it.
	other := brokertest.Queue(t, farm.Client(t), worker("w2"))
	l = begin(t, other)
	if got := l.Job().Operation; got != waiting {
		t.Errorf("the other worker got %s, want %s", got, waiting)
	}
	settle(t, l, 0)
	terminal(t, c, waiting)
	select {
	case <-leases:
		t.Error("a drained worker took a job")
	default:
	}
	if info, err := viewer.DrainWorker(t.Context(), "w1", false); err != nil || info.Draining {
		t.Fatalf("undrain: %+v, %v", info, err)
	}
	again := submit(t, c, broker.Request{Action: action(3)})
	if err := taking.Wait(); err != nil {
		t.Fatal(err)
	}
	l = <-leases
	if err := l.Begin(t.Context()); err != nil || l.Job().Operation != again {
		t.Fatalf("the undrained worker got %v, %v", l.Job(), err)
	}
	settle(t, l, 0)
	for _, name := range []string{"nobody", "a.b", "*", ""} {
		if _, err := viewer.DrainWorker(t.Context(), name, true); !errors.Is(err, broker.ErrUnknownWorker) && !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("DrainWorker(%q) = %v", name, err)
		}
	}
}
