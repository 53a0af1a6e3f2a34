package broker_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// idlers are n workers of a farm that wait for the jobs of some pools; each gives what it gets to work. They end
// with the test.
func idlers(t testing.TB, farm *brokertest.Farm, c *broker.Client, n, pools int, looks float64, work func(context.Context, *broker.Lease) error) {
	t.Helper()
	properties := make([]string, pools-1)
	for i := range properties {
		properties[i] = "p" + itoa(i) + "=1"
	}
	offers := must(broker.ParsePlatform(properties))
	ctx, stop := context.WithCancelCause(t.Context())
	var group errgroup.Group
	for i := range n {
		q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "idle-" + itoa(i), Slots: 1, Platform: offers})
		q.SetLaneLooks(looks)
		group.Go(func() error { return serve(ctx, q, func(l *broker.Lease) error { return work(ctx, l) }) })
	}
	t.Cleanup(func() {
		stop(nil)
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "all workers are known", func() bool { return len(c.Workers()) == n })
	for i, property := range properties {
		operation := submit(t, c, broker.Request{Action: action(1000 + i), Platform: must(broker.ParsePlatform([]string{property}))})
		if err := c.Cancel(t.Context(), operation); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the consumers of the pools", func() bool { return farm.Consumers(t, "JOBS") == pools*broker.Lanes })
}

// TestIdleWorkersAskLittle: what idle workers ask does not grow with their number, and a job that nobody rings
// for is found all the same.
func TestIdleWorkersAskLittle(t *testing.T) {
	const workers, pools, looks = 40, 4, 3
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{AckWait: 500 * time.Millisecond})
	idlers(t, farm, c, workers, pools, looks, func(ctx context.Context, l *broker.Lease) error { return l.Settle(ctx, outcome(3)) })
	if rate := pullRate(t, farm); rate > 2*looks*pools*broker.Lanes {
		t.Errorf("%.0f pulls a second, want about %d; once a second each would be %d", rate, looks*pools*broker.Lanes, workers*pools*broker.Lanes)
	}

	// A job that comes without a bell is found all the same.
	operation := submit(t, unheard(t, farm), broker.Request{Action: action(1)})
	within(t, 30*time.Second, "the end of a job that nobody rang for", func() bool { return must(c.Get(t.Context(), operation)).Done() })
}

// pullRate is how many pulls a second arrive at the broker.
func pullRate(t testing.TB, farm *brokertest.Farm) float64 {
	t.Helper()
	var asked atomic.Int64
	nc := farm.Connect(t)
	if _, err := nc.Subscribe("$JS.API.CONSUMER.MSG.NEXT.>", func(*nats.Msg) { asked.Add(1) }); err != nil {
		t.Fatal(err)
	}
	pauseFor(t, 8*time.Second) // until they are at rest and know how many they are
	asked.Store(0)
	began := time.Now()
	pauseFor(t, 4*time.Second)
	return float64(asked.Load()) / time.Since(began).Seconds()
}

// unheard is a client whose bells are lost.
func unheard(t *testing.T, farm *brokertest.Farm) *broker.Client {
	t.Helper()
	cutter := farm.Cutter(t)
	cutter.Lose("jetfarm.bell.")
	return cutter.Client(t, farm, broker.Config{})
}

// TestJobsWithoutBells: where one is found the others are found, too, long before each lane is looked into
// as often as there are jobs.
func TestJobsWithoutBells(t *testing.T) {
	const jobs, looks = 24, 1
	farm := brokertest.Start(t)
	c := farm.Client(t)
	var running atomic.Int64
	idlers(t, farm, c, jobs, 4, looks, func(ctx context.Context, _ *broker.Lease) error {
		running.Add(1)
		<-ctx.Done() // it takes no other
		return nil
	})
	pauseFor(t, 8*time.Second) // until they are at rest and know how many they are
	silent := unheard(t, farm)
	for n := range jobs {
		submit(t, silent, broker.Request{Action: action(n), Priority: 1})
	}
	// A lane is looked into about once a second, and by each worker every 24 s.
	within(t, 20*time.Second, "all jobs run", func() bool { return running.Load() == jobs })
}

// BenchmarkIdleWorkers is what workers ask the broker that wait for the jobs of 16 pools.
func BenchmarkIdleWorkers(b *testing.B) {
	for _, workers := range []int{10, 200} {
		b.Run(itoa(workers), func(b *testing.B) {
			farm := brokertest.Start(b)
			idlers(b, farm, farm.Client(b), workers, 16, broker.LaneLooks, func(context.Context, *broker.Lease) error { return nil })
			for b.Loop() {
				b.ReportMetric(pullRate(b, farm), "pulls/s")
			}
		})
	}
}
