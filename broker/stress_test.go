package broker_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// TestNoLockAcrossIO: what a process knows by itself can be asked while its calls wait for a broker that is
// silent (audit row 10).
func TestNoLockAcrossIO(t *testing.T) {
	farm := brokertest.Start(t)
	p := startProxy(t, strings.TrimPrefix(farm.URL(), "nats://"))
	c := farm.ClientAt(t, p.url(), broker.Config{})
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Slots: 2})
	running := submit(t, c, broker.Request{Action: action(1)})
	lease := begin(t, q)
	op := must(c.Get(t.Context(), running))

	p.stall()
	var waiting errgroup.Group
	var returned atomic.Int64
	calls := []func() error{
		func() error { _, err := c.Submit(t.Context(), broker.Request{Action: action(2)}); return err },
		func() error { return c.Cancel(t.Context(), running) },
		func() error { _, err := c.Get(t.Context(), running); return err },
		func() error { _, _, err := c.List(t.Context(), 10, ""); return err },
		func() error { _, err := c.Pools(t.Context()); return err },
		func() error { return lease.Settle(t.Context(), outcome(0)) },
	}
	for _, call := range calls {
		waiting.Go(func() error {
			err := call()
			returned.Add(1)
			if errors.Is(err, broker.ErrLost) { // the cancel was first
				return nil
			}
			return err
		})
	}
	for range 1000 {
		c.Workers()
		c.Held()
		c.Replicas()
		c.Explain(op)
		lease.Job()
		lease.Attempt()
	}
	if n := returned.Load(); n == int64(len(calls)) {
		t.Error("all calls to the silent broker have returned before what needs no broker has")
	}
	p.resume()
	if err := waiting.Wait(); err != nil {
		t.Error(err)
	}
}

// TestSubUnsubPublishStress: watchers come and go while operations are made, cancelled, settled and deleted
// (audit row 21).
func TestSubUnsubPublishStress(t *testing.T) {
	const watchers, submitters, rounds = 16, 4, 25
	farm := brokertest.Start(t)
	soon := broker.Config{Heartbeat: 50 * time.Millisecond}
	c, other := farm.ClientWith(t, soon), farm.ClientWith(t, soon)
	q := brokertest.Queue(t, other, broker.WorkerInfo{Name: "w1", Slots: submitters})
	names := make(chan string, watchers*submitters*rounds)
	var working, submitting, watching errgroup.Group
	over := errors.New("the watchers have gone")
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(over)
	working.Go(func() error {
		err := error(nil)
		for err == nil || errors.Is(err, broker.ErrLost) {
			var l *broker.Lease
			if l, err = q.Next(ctx); err != nil {
				break
			}
			if err = l.Begin(ctx); err == nil {
				err = l.Settle(ctx, outcome(0))
			}
		}
		if errors.Is(err, over) {
			return nil
		}
		return err
	})
	for s := range submitters {
		submitting.Go(func() error {
			for i := range rounds {
				name, err := c.Submit(t.Context(), broker.Request{Action: action(s*rounds + i)})
				if err != nil {
					return err
				}
				for range watchers {
					names <- name
				}
				switch i % 5 {
				case 3:
					err = other.Cancel(t.Context(), name)
				case 4:
					err = other.Delete(t.Context(), name)
				}
				if err != nil && !errors.Is(err, broker.ErrNotFound) {
					return err
				}
			}
			return nil
		})
	}
	for w := range watchers {
		watching.Go(func() error {
			for name := range names {
				seen := 0
				for _, err := range []*broker.Client{c, other}[w%2].Watch(t.Context(), name) {
					if err != nil && !errors.Is(err, broker.ErrNotFound) {
						return err
					}
					if seen++; seen > w%3 {
						break
					}
				}
			}
			return nil
		})
	}
	if err := submitting.Wait(); err != nil {
		t.Error(err)
	}
	close(names)
	if err := watching.Wait(); err != nil {
		t.Error(err)
	}
	stop(over)
	if err := working.Wait(); err != nil {
		t.Error(err)
	}
	eventually(t, "no status subscription", func() bool { return farm.Subscriptions(t, "jetfarm.status.") == 0 })
}
