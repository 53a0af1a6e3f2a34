package broker_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// TestEveryLaneOfEveryPoolHasAShare: full lanes leave the others something (row EXA-28).
func TestEveryLaneOfEveryPoolHasAShare(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	platform := must(broker.ParsePlatform([]string{"x=y"}))
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w", Slots: 1000, Platform: platform})
	eventually(t, "the worker is known", func() bool { return len(c.Workers()) == 1 })
	n := 0
	for range 40 {
		for _, r := range []broker.Request{{Priority: -1}, {Priority: 0}, {Priority: 1}, {Priority: 1, Platform: platform}} {
			n++
			r.Action = action(n)
			submit(t, c, r)
		}
	}
	taken := map[string]int{}
	for range 80 {
		l := next(t, q)
		op := must(c.Get(t.Context(), l.Job().Operation))
		taken[itoa(int(l.Job().Priority))+" "+op.Platform.String()]++
	}
	if len(taken) != 4 {
		t.Errorf("of 80 jobs were taken %v, want some of each kind", taken)
	}
}

// TestRunningOperationWithoutJob: an operation whose job is lost while it runs, and whose worker is
// gone, is run again.
func TestRunningOperationWithoutJob(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Heartbeat: 20 * time.Millisecond, MendAfter: time.Millisecond})
	q := brokertest.Queue(t, c, worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	l := begin(t, q)
	farm.Purge(t, "JOBS")
	l.Drop(t.Context())
	var group errgroup.Group
	group.Go(func() error { settle(t, begin(t, q), 0); return nil })
	terminal(t, c, operation)
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, farm)
}

// TestNobodyCanServe: an operation that was queued before any worker came ends when only workers that
// cannot serve it have been there for a while (row EXA-23).
func TestNobodyCanServe(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Heartbeat: 20 * time.Millisecond, MendAfter: time.Millisecond, Patience: 100 * time.Millisecond})
	operation := submit(t, c, broker.Request{Action: action(1), Platform: must(broker.ParsePlatform([]string{"arch=arm"}))})
	brokertest.Queue(t, c, broker.WorkerInfo{Name: "w", Slots: 1, Platform: must(broker.ParsePlatform([]string{"arch=x86"}))})
	r := response(t, terminal(t, c, operation))
	if statusCode(r) != code.Code_FAILED_PRECONDITION || !strings.Contains(r.GetStatus().GetMessage(), `"arm"`) {
		t.Errorf("status is %v, want FAILED_PRECONDITION with the property", r.GetStatus())
	}
	nothingLeft(t, farm)
}

// TestUndeclaredPropertiesMakeNoPools: a client cannot use up the pools with properties that mean
// nothing here.
func TestUndeclaredPropertiesMakeNoPools(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	eventually(t, "the worker is known", func() bool { return len(c.Workers()) == 1 })
	for i := range 40 {
		submit(t, c, broker.Request{Action: action(i), Platform: must(broker.ParsePlatform([]string{"cookie=" + itoa(i)}))})
	}
	if got := farm.Consumers(t, "JOBS"); got != 4 {
		t.Errorf("%d consumers, want the 4 lanes of one pool", got)
	}
	for range 40 {
		settle(t, begin(t, q), 0)
	}
	nothingLeft(t, farm)
}

// TestLateAnswerIsNotTaken: a job that an answer brings after its pull was given up goes to another
// worker, and is not taken by the one that asked for it long ago.
func TestLateAnswerIsNotTaken(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	p := startProxy(t, strings.TrimPrefix(farm.URL(), "nats://"))
	other := farm.ClientWith(t, broker.Config{AckWait: time.Second})
	c := farm.ClientAt(t, p.url(), broker.Config{AckWait: time.Second})
	slow := brokertest.Queue(t, c, worker("slow"))
	slow.SetPullBound(200 * time.Millisecond)
	p.stall()
	var group errgroup.Group
	group.Go(func() error { settle(t, begin(t, slow), 0); return nil })
	var operations []string
	for i := range 3 {
		operations = append(operations, submit(t, other, broker.Request{Action: action(i)}))
	}
	pauseFor(t, time.Second)
	p.resume()
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	fast := brokertest.Queue(t, other, broker.WorkerInfo{Name: "fast", Slots: 9})
	leases := []*broker.Lease{begin(t, fast), begin(t, fast)}
	ctx, cancel := contextWithTimeout(t, 2*time.Second)
	defer cancel()
	if l, err := slow.Next(ctx); err == nil {
		t.Errorf("the slow worker took %s, which another one runs", l.Job().Operation)
	}
	for _, l := range leases {
		settle(t, l, 0)
	}
	for _, operation := range operations {
		terminal(t, other, operation)
	}
	nothingLeft(t, farm)
}

// TestJobThatComesAsAWorkerLooks: it is found soon, whatever the broker says while it tells its consumers,
// and does not depend on the worker's looking again a second later.
func TestJobThatComesAsAWorkerLooks(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, farm.Client(t), worker("w1"))
	q.SetIdleSweep(time.Hour)
	for i := range 1000 {
		submit(t, c, broker.Request{Action: action(i)})
		settle(t, begin(t, q), 0)
	}
}

// TestNextEndsWithItsContext although the broker is silent.
func TestNextEndsWithItsContext(t *testing.T) {
	farm := brokertest.Start(t)
	p := startProxy(t, strings.TrimPrefix(farm.URL(), "nats://"))
	q := brokertest.Queue(t, farm.ClientAt(t, p.url(), broker.Config{}), worker("w1"))
	q.SetPullBound(time.Second)
	p.stall()
	defer p.resume()
	ctx, cancel := contextWithTimeout(t, 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := q.Next(ctx); err == nil {
		t.Error("Next took a job of a silent broker")
	}
	// Four lanes would take four times the bound of a pull.
	if took := time.Since(began); took > 2500*time.Millisecond {
		t.Errorf("Next took %v to end", took)
	}
}

// pauseFor lets time pass that a fault needs to show.
// TestOutageDuringSubmit: what reaches the broker after its sender has given up has an end, too.
func TestOutageDuringSubmit(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	p := startProxy(t, strings.TrimPrefix(farm.URL(), "nats://"))
	c := farm.ClientAt(t, p.url(), broker.Config{Reconcile: time.Hour})
	other := farm.ClientWith(t, broker.Config{Reconcile: 100 * time.Millisecond, MendAfter: time.Millisecond})
	_, err := c.Submit(t.Context(), broker.Request{Action: action(1), Confirm: func(context.Context) error {
		p.stall() // from here on the broker gets nothing
		return nil
	}})
	if !errors.Is(err, broker.ErrUnavailable) {
		t.Errorf("Submit = %v, want ErrUnavailable", err)
	}
	p.resume()
	eventually(t, "there is a record", func() bool { return farm.Messages(t, "OPERATIONS") == 1 })
	q := brokertest.Queue(t, other, worker("w1"))
	operation := strings.TrimPrefix(farm.All(t, "OPERATIONS")[0].Subject, "jetfarm.op.")
	if op := must(c.Get(t.Context(), operation)); !op.Done() {
		settle(t, begin(t, q), 0)
	}
	terminal(t, other, operation)
	nothingLeft(t, farm)
}

func pauseFor(t testing.TB, d time.Duration) {
	t.Helper()
	ctx, cancel := contextWithTimeout(t, d)
	defer cancel()
	<-ctx.Done()
}

// proxy forwards TCP connections, and holds what it has read while it is stalled.
type proxy struct {
	listener net.Listener
	to       string
	group    errgroup.Group

	mu    sync.Mutex
	open  chan struct{} // guarded by mu; closed while not stalled
	conns []net.Conn    // guarded by mu
}

func startProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, to: to, open: make(chan struct{})}
	close(p.open)
	p.group.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) url() string { return "nats://" + p.listener.Addr().String() }

func (p *proxy) accept() error {
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return nil //nolint:nilerr // closed
		}
		out, err := new(net.Dialer).Dial("tcp", p.to)
		if err != nil {
			return errors.Join(err, in.Close())
		}
		p.mu.Lock()
		p.conns = append(p.conns, in, out)
		p.mu.Unlock()
		p.group.Go(func() error { return p.copy(in, out) })
		p.group.Go(func() error { return p.copy(out, in) })
	}
}

func (p *proxy) copy(from, to net.Conn) error {
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		p.mu.Lock()
		open := p.open
		p.mu.Unlock()
		<-open
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return nil //nolint:nilerr // the other side is gone
			}
		}
		if err != nil {
			return to.Close()
		}
	}
}

func (p *proxy) stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = make(chan struct{})
}

func (p *proxy) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.open:
	default:
		close(p.open)
	}
}

func (p *proxy) close() {
	p.listener.Close()
	p.resume()
	p.mu.Lock()
	for _, c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.group.Wait() //nolint:errcheck // connections that the test has closed
}
