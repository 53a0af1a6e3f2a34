package broker_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

func platform(t testing.TB, pairs ...string) broker.Platform {
	t.Helper()
	p, err := broker.ParsePlatform(pairs)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func offers(t testing.TB, name string, pairs ...string) broker.WorkerInfo {
	t.Helper()
	return broker.WorkerInfo{Name: name, Slots: 1, Platform: platform(t, pairs...)}
}

func TestParsePlatformRefuses(t *testing.T) {
	for _, pairs := range [][]string{
		{"cores<=many"},
		{"cores<=-1"},
		{"cores<=NaN"},
		{"cores<=Inf"},
		{"<=4"},
		{"cores<=4", "cores<=8"},
		{"cores<=4", "cores=8"},
		{"persistentWorkerKey=x"},
		{"label:a=x"},
		{"a=" + strings.Repeat("x", 2000)},
	} {
		if p, err := broker.ParsePlatform(pairs); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("ParsePlatform(%.60q) = %v, %v, want ErrInvalid", pairs, p, err)
		}
	}
	if p := platform(t, "cores<=16", "a=1", "a=2"); p.String() != "a=1, a=2, cores<=16" {
		t.Errorf("the platform is %v", p)
	}
}

// Row EXA-22: a platform with two operating systems is a mistake.
func TestTwoOperatingSystems(t *testing.T) {
	if _, err := broker.PlatformOf(asked("OSFamily=linux", "OSFamily=windows")); !errors.Is(err, broker.ErrInvalid) {
		t.Errorf("PlatformOf two systems = %v, want ErrInvalid", err)
	}
	if _, err := broker.PlatformOf(asked("OSFamily=linux", "OSFamily=Linux", "ISA=x86-64", "ISA=x86-avx2")); err != nil {
		t.Errorf("PlatformOf one system: %v", err)
	}
}

// Actions that ask for numbers share the pools of the workers that have as much, however many numbers
// they ask for, and so do those that spell a name in another way.
func TestPoolsAreAsFewAsTheKindsOfWorkers(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	small := brokertest.Queue(t, c, offers(t, "small", "cores<=4", "OSFamily=Linux"))
	big := brokertest.Queue(t, c, offers(t, "big", "cores<=16", "OSFamily=Linux"))
	eventually(t, "both workers known", func() bool { return len(c.Workers()) == 2 })
	for i := range 16 {
		family := []string{"OSFamily=linux", "OSFamily=LINUX"}[i%2]
		submit(t, c, broker.Request{Action: action(i), Platform: must(broker.PlatformOf(asked(fmt.Sprintf("cores=%d", i+1), family)))})
	}
	if got := farm.Consumers(t, "JOBS"); got != 3*broker.Lanes {
		t.Errorf("%d consumers, want the lanes of three pools: any, up to 4 and up to 16", got)
	}
	for range 4 {
		settle(t, begin(t, small), 0)
	}
	for range 12 {
		settle(t, begin(t, big), 0)
	}
	nothingLeft(t, farm)
}

// Row EXA-24: an action for workers that are not there now waits for one, says so, and does not run on
// workers that never had what it asks for.
func TestPoolThatIsScaledToZeroWakes(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	t.Run("the worker that leaves", func(t *testing.T) {
		q := brokertest.Queue(t, c, offers(t, "gpu1", "gpu=a100"))
		operation := submit(t, c, broker.Request{Action: action(1), Platform: must(broker.PlatformOf(asked("gpu=a100")))})
		settle(t, begin(t, q), 0)
		terminal(t, c, operation)
	})
	plain := brokertest.Queue(t, c, worker("plain"))
	eventually(t, "only the plain worker known", func() bool { return len(c.Workers()) == 1 && c.Workers()[0].Name == "plain" })
	operation := submit(t, c, broker.Request{Action: action(2), Platform: must(broker.PlatformOf(asked("gpu=a100")))})
	why := c.Explain(must(c.Get(t.Context(), operation)))
	for _, text := range []string{`"gpu" is not declared`, `asks for "a100"`, "plain", "here within a week"} {
		if !strings.Contains(why, text) {
			t.Errorf("the operation waits because %q, want %q in it", why, text)
		}
	}
	ctx, cancel := contextWithTimeout(t, 2*time.Second)
	defer cancel()
	if l, err := plain.Next(ctx); err == nil {
		t.Fatalf("the worker without the property got %v", l.Job())
	}
	back := brokertest.Queue(t, c, offers(t, "gpu2", "gpu=a100", "cores<=4"))
	settle(t, begin(t, back), 0)
	terminal(t, c, operation)
	nothingLeft(t, farm)
}

// The patience with what no worker can serve begins when there is none, not when the operation came, and a
// worker that comes within it runs the operation.
func TestPatience(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Patience: 10 * time.Second})
	x86 := brokertest.Queue(t, c, offers(t, "x86", "arch=x86"))
	eventually(t, "the worker is known", func() bool { return len(c.Workers()) == 1 })
	operations := make(chan string, 1)
	var g errgroup.Group
	var ended *broker.Operation
	g.Go(func() error { // stranger: a tenth of the patience
		operation := submit(t, c, broker.Request{Action: action(1), Platform: platform(t, "arch=riscv")})
		operations <- operation
		ended = terminal(t, c, operation)
		return nil
	})
	if why := c.Explain(must(c.Get(t.Context(), <-operations))); !strings.Contains(why, `"arch" is "x86", the action asks for "riscv"`) {
		t.Errorf("the operation waits because %q", why)
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	r := response(t, ended)
	if statusCode(r) != code.Code_FAILED_PRECONDITION || !strings.Contains(r.GetStatus().GetMessage(), `"riscv"; no worker has offered it for a week; none came in`) {
		t.Errorf("status %v, want FAILED_PRECONDITION with the reason", r.GetStatus())
	}
	begun := time.Now()
	g.Go(func() error {
		operation := submit(t, c, broker.Request{Action: action(2), Platform: platform(t, "arch=arm")})
		if r := response(t, terminal(t, c, operation)); r.GetStatus().GetCode() != 0 {
			return fmt.Errorf("an operation whose worker came ended with %v after %v", r.GetStatus(), time.Since(begun))
		}
		return nil
	})
	eventually(t, "the job", func() bool { return farm.Messages(t, "JOBS") == 1 })
	settle(t, begin(t, brokertest.Queue(t, c, offers(t, "arm", "arch=arm"))), 0)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	submit(t, c, broker.Request{Action: action(3), Platform: platform(t, "arch=x86")})
	settle(t, begin(t, x86), 0)
	nothingLeft(t, farm)
}

// shapes are as many values of one property.
func shapes(n int, more ...int) (pairs []string) {
	for i := range n {
		pairs = append(pairs, fmt.Sprintf("shape=%d", i))
	}
	for _, i := range more {
		pairs = append(pairs, fmt.Sprintf("shape=%d", i))
	}
	return pairs
}

// Mistakes make no pools: clients that ask for what no worker has had within a week can't use them up.
func TestStrangersMakeNoPools(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, offers(t, "w", "kind=a"))
	eventually(t, "the worker is known", func() bool { return len(c.Workers()) == 1 })
	var operations []string
	for i := range 40 {
		operations = append(operations, submit(t, c, broker.Request{Action: action(i), Platform: platform(t, fmt.Sprintf("kind=%d", i))}))
	}
	if got := farm.Consumers(t, "JOBS"); got != broker.Lanes {
		t.Errorf("%d consumers, want those of the default pool", got)
	}
	var g errgroup.Group
	for i, operation := range operations[:30] {
		g.Go(func() error {
			if r := response(t, terminal(t, c, operation)); i == 0 && r.GetStatus().GetCode() != 0 {
				return fmt.Errorf("the one that a worker came for ended with %v", r.GetStatus())
			}
			return nil
		})
	}
	zero := brokertest.Queue(t, c, offers(t, "zero", "kind=0"))
	settle(t, begin(t, zero), 0)
	for _, operation := range operations[1:] {
		if err := c.Cancel(t.Context(), operation); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	submit(t, c, broker.Request{Action: action(100), Platform: platform(t, "kind=a")})
	settle(t, begin(t, q), 0)
	nothingLeft(t, farm)
}

// Pools that nobody uses make room for others, and whoever uses one again finds it.
func TestPoolsThatNobodyUsesGo(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c, other := farm.Client(t), farm.Client(t) // do not remove so soon, but have to hear of it
	q := brokertest.Queue(t, other, offers(t, "w", append(shapes(20, 99), "kind=a")...))
	eventually(t, "the worker is known", func() bool { return len(c.Workers()) == 1 })
	used := submit(t, c, broker.Request{Action: action(0), Platform: platform(t, "kind=a")})
	l := begin(t, q)
	for i := range 14 {
		operation := submit(t, c, broker.Request{Action: action(1 + i), Platform: platform(t, "kind=a", fmt.Sprintf("shape=%d", i))})
		if err := c.Cancel(t.Context(), operation); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Submit(t.Context(), broker.Request{Action: action(50), Platform: platform(t, "kind=a", "shape=99")}); !errors.Is(err, broker.ErrTooManyPools) || !strings.Contains(err.Error(), "shape=99") {
		t.Errorf("one pool more than there may be: %v, want ErrTooManyPools that names it", err)
	}
	remover := farm.ClientWith(t, broker.Config{PoolIdle: 300 * time.Millisecond})
	if err := remover.Cancel(t.Context(), submit(t, remover, broker.Request{Action: action(60)})); err != nil { // who uses no pool removes none
		t.Fatal(err)
	}
	within(t, time.Minute, "only the default pool and the one that is used", func() bool { return farm.Consumers(t, "JOBS") == 2*broker.Lanes })
	settle(t, l, 0)
	terminal(t, c, used)
	eventually(t, "only the default pool", func() bool {
		return farm.Consumers(t, "JOBS") == broker.Lanes && farm.Consumers(t, "HELD") == 1
	})
	for i, client := range []*broker.Client{c, other, remover} {
		operation := submit(t, client, broker.Request{Action: action(100 + i), Platform: platform(t, "kind=a")})
		settle(t, begin(t, q), 0)
		terminal(t, c, operation)
	}
	nothingLeft(t, farm)
}

// Jobs that come while their pool is removed run, however the two meet.
func TestPoolsGoWhileJobsCome(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	cfg := broker.Config{PoolIdle: 20 * time.Millisecond, Heartbeat: 300 * time.Millisecond, MendAfter: time.Millisecond}
	clients := []*broker.Client{farm.ClientWith(t, cfg), farm.ClientWith(t, cfg)}
	workers := farm.Client(t)
	q := brokertest.Queue(t, workers, broker.WorkerInfo{Name: "w", Slots: 8, Platform: platform(t, "kind=a")})
	for _, c := range clients {
		eventually(t, "the worker is known", func() bool { return len(c.Workers()) == 1 })
	}
	const jobs = 60
	var g errgroup.Group
	for n, c := range clients {
		g.Go(func() error {
			for i := range jobs {
				pauseFor(t, rand.N(80*time.Millisecond)) // the pool goes some 50 ms after its last job
				operation := submit(t, c, broker.Request{Action: action(n*jobs + i), Platform: platform(t, "kind=a")})
				if op := terminal(t, c, operation); op.Stage != repb.ExecutionStage_COMPLETED {
					return fmt.Errorf("operation %+v", op)
				}
			}
			return nil
		})
	}
	for left := len(clients) * jobs; left > 0; {
		l := next(t, q)
		err := l.Begin(t.Context())
		if errors.Is(err, broker.ErrLost) {
			continue // the pool went before the job was acknowledged, so it came again
		}
		if err != nil {
			t.Fatalf("Begin: %v", err)
		}
		settle(t, l, 0)
		left--
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	eventually(t, "only the default pool", func() bool { return farm.Consumers(t, "JOBS") == broker.Lanes })
	nothingLeft(t, farm)
}
