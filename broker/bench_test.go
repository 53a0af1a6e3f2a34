package broker_test

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// BenchmarkOperation is the whole life of an operation without the work: submitted, taken, begun,
// settled, its end seen.
func BenchmarkOperation(b *testing.B) {
	for _, clients := range []int{1, 8, 64} {
		b.Run("clients="+itoa(clients), func(b *testing.B) {
			farm := brokertest.Start(b)
			c := farm.Client(b)
			ctx, stop := context.WithCancelCause(b.Context())
			var workers errgroup.Group
			for i := range 4 {
				q := brokertest.Queue(b, farm.Client(b), worker("w"+itoa(i)))
				workers.Go(func() error {
					return serve(ctx, q, func(l *broker.Lease) error { return l.Settle(ctx, outcome(0)) })
				})
			}
			var n atomic.Int64
			b.SetParallelism(clients)
			runtime.GC()
			b.ResetTimer()
			var group errgroup.Group
			group.SetLimit(clients)
			for b.Loop() {
				group.Go(func() error {
					operation, err := c.Submit(ctx, broker.Request{Action: action(int(n.Add(1)))})
					if err != nil {
						return err
					}
					for _, err := range c.Watch(ctx, operation) {
						if err != nil {
							return err
						}
					}
					return nil
				})
			}
			if err := group.Wait(); err != nil {
				b.Fatal(err)
			}
			stop(nil)
			if err := workers.Wait(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkBacklog is an operation that is submitted, and one that is taken and settled, while others wait.
func BenchmarkBacklog(b *testing.B) {
	for _, waiting := range []int{0, 1000, 100_000} {
		b.Run("waiting="+itoa(waiting), func(b *testing.B) {
			farm := brokertest.Start(b)
			c := farm.ClientWith(b, broker.Config{MaxTenant: 200_000, MendAfter: time.Hour})
			q := brokertest.Queue(b, farm.Client(b), worker("w"))
			n := 0
			one := func() {
				n++
				if _, err := c.Submit(b.Context(), build("build "+itoa(n%100), n)); err != nil {
					b.Fatal(err)
				}
			}
			for range waiting {
				one()
			}
			var spent [2]time.Duration
			runtime.GC()
			for b.Loop() {
				start := time.Now()
				one()
				spent[0] += time.Since(start)
				start = time.Now()
				l, err := q.Next(b.Context())
				if err == nil {
					err = l.Begin(b.Context())
				}
				if err == nil {
					err = l.Settle(b.Context(), outcome(0))
				}
				if err != nil {
					b.Fatal(err)
				}
				spent[1] += time.Since(start)
			}
			b.ReportMetric(float64(spent[0].Microseconds())/float64(b.N), "us/submit")
			b.ReportMetric(float64(spent[1].Microseconds())/float64(b.N), "us/dispatch")
			b.ReportMetric(float64(heap())/(1<<20), "MiB")
		})
	}
}

// BenchmarkWatcher is the memory of one waiting watcher, with its share of the server, as heap-B/watcher, and of the
// goroutine in which it waits, as stack-B/watcher.
func BenchmarkWatcher(b *testing.B) {
	farm := brokertest.Start(b)
	c := farm.Client(b)
	operation := submit(b, c, broker.Request{Action: action(1)})
	const watchers = 10_000
	for b.Loop() {
		ctx, cancel := context.WithCancelCause(b.Context())
		before, stackBefore := inUse()
		waiting := make(chan struct{}, watchers)
		var group errgroup.Group
		for range watchers {
			group.Go(func() error {
				for _, err := range c.Watch(ctx, operation) {
					if err != nil {
						break // the end of ctx
					}
					waiting <- struct{}{}
				}
				return nil
			})
		}
		for range watchers {
			<-waiting
		}
		after, stackAfter := inUse()
		b.ReportMetric(float64(after-before)/watchers, "heap-B/watcher")
		b.ReportMetric(float64(stackAfter-stackBefore)/watchers, "stack-B/watcher")
		cancel(nil)
		if err := group.Wait(); err != nil {
			b.Fatal(err)
		}
	}
}

func heap() int64 {
	heap, stacks := inUse()
	return heap + stacks
}

func inUse() (heap, stacks int64) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse), int64(m.StackInuse)
}
