package broker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

func asked(pairs ...string) *repb.Platform {
	p := new(repb.Platform)
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		p.Properties = append(p.Properties, &repb.Platform_Property{Name: name, Value: value})
	}
	return p
}

func TestPlatformIsCanonical(t *testing.T) {
	a := must(broker.PlatformOf(asked("b=2", "a=1", "a=1", "persistentWorkerKey=x", "label:pool=y")))
	b := must(broker.PlatformOf(asked("a=1", "b=2")))
	if a.String() != b.String() || a.String() != "a=1, b=2" {
		t.Errorf("platforms %v and %v, want a=1, b=2", a, b)
	}
	if empty := must(broker.PlatformOf(nil)); len(empty) != 0 {
		t.Errorf("platform of nil = %v", empty)
	}
}

func TestPlatformBounds(t *testing.T) {
	var many []string
	for i := range 65 {
		many = append(many, fmt.Sprintf("p%d=1", i))
	}
	for _, pairs := range [][]string{many, {"=x"}, {"a=" + strings.Repeat("x", 2000)}} {
		if _, err := broker.PlatformOf(asked(pairs...)); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("PlatformOf(%.40q) = %v, want ErrInvalid", pairs, err)
		}
	}
	if _, err := broker.ParsePlatform([]string{"novalue"}); !errors.Is(err, broker.ErrInvalid) {
		t.Errorf("ParsePlatform without = gave %v, want ErrInvalid", err)
	}
}

// TestJobsGoToWorkersThatOfferThePlatform: a job waits for a worker that has what it asks for; what
// nobody declares does not matter.
func TestJobsGoToWorkersThatOfferThePlatform(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	gpu := must(broker.ParsePlatform([]string{"gpu=a100", "OSFamily=Linux"}))
	cpu := must(broker.ParsePlatform([]string{"gpu=none"}))
	onGPU := brokertest.Queue(t, c, broker.WorkerInfo{Name: "gpu", Platform: gpu, Slots: 1})
	onCPU := brokertest.Queue(t, c, broker.WorkerInfo{Name: "cpu", Platform: cpu, Slots: 1})
	eventually(t, "both workers known", func() bool { return len(c.Workers()) == 2 })

	want := submit(t, c, broker.Request{Action: action(1), Platform: must(broker.PlatformOf(asked("gpu=a100", "OSFamily=linux", "unheard=of")))})
	l := begin(t, onGPU)
	if l.Job().Operation != want {
		t.Fatalf("the GPU worker got %s, want %s", l.Job().Operation, want)
	}
	settle(t, l, 0)

	want = submit(t, c, broker.Request{Action: action(2), Platform: must(broker.PlatformOf(asked("gpu=none")))})
	l = begin(t, onCPU)
	if l.Job().Operation != want {
		t.Fatalf("the CPU worker got %s, want %s", l.Job().Operation, want)
	}
	settle(t, l, 0)

	impatient := farm.ClientWith(t, broker.Config{Patience: -1})
	eventually(t, "both workers known", func() bool { return len(impatient.Workers()) == 2 })
	_, err := impatient.Submit(t.Context(), broker.Request{Action: action(3), Platform: must(broker.PlatformOf(asked("gpu=h100")))})
	if !errors.Is(err, broker.ErrNoWorker) || !strings.Contains(err.Error(), `gpu`) || !strings.Contains(err.Error(), `"h100"`) {
		t.Errorf("Submit for a platform that nobody offers = %v, want ErrNoWorker with the key and the value", err)
	}
	nothingLeft(t, farm)
}

// TestJobWaitsForTheFirstWorker: any start order works, and a worker that comes later finds the pools
// that clients asked for before.
func TestJobWaitsForTheFirstWorker(t *testing.T) {
	farm := brokertest.Start(t)
	platform := must(broker.PlatformOf(asked("OSFamily=linux", "pool=big")))
	submit(t, farm.Client(t), broker.Request{Action: action(1), Platform: platform})
	late := farm.Client(t)
	q := brokertest.Queue(t, late, broker.WorkerInfo{Name: "late", Platform: platform, Slots: 1})
	settle(t, begin(t, q), 0)
	nothingLeft(t, farm)
}

func TestTooManyPlatforms(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	var refused error
	for i := range 40 {
		platform := must(broker.PlatformOf(asked(fmt.Sprintf("shape=%d", i))))
		if _, refused = c.Submit(t.Context(), broker.Request{Action: action(i), Platform: platform}); refused != nil {
			break
		}
	}
	if !errors.Is(refused, broker.ErrTooManyPools) {
		t.Errorf("40 platforms ended with %v, want ErrTooManyPools", refused)
	}
}

// A lower priority runs sooner, and the last lane is not starved by the first.
func TestEXA_27_EXA_28_LowerPriorityRunsSooner(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	for i := range 20 {
		submit(t, c, broker.Request{Action: action(i)})
	}
	late := submit(t, c, broker.Request{Action: action(100), Priority: 5})
	soon := submit(t, c, broker.Request{Action: action(101), Priority: -5})
	q := brokertest.Queue(t, c, worker("w1"))
	var order []string
	for range 22 {
		l := begin(t, q)
		order = append(order, l.Job().Operation)
		settle(t, l, 0)
	}
	// For a moment the broker does not give out what it has just confirmed, so another one may be given first.
	if order[0] != soon && order[1] != soon {
		t.Errorf("the operation with the lowest priority value did not run first")
	}
	ran := -1
	for i, operation := range order {
		if operation == late {
			ran = i
		}
	}
	if ran < 1 || ran > 16 {
		t.Errorf("the operation with the highest priority value ran as number %d of 22, want it neither first nor starved", ran)
	}
}

func TestWorkerRegistryExpiry(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	t.Run("worker", func(t *testing.T) {
		brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Slots: 3})
		eventually(t, "the worker is known", func() bool { return len(c.Workers()) == 1 && c.Workers()[0].Slots == 3 })
	})
	eventually(t, "the worker that left is gone", func() bool { return len(c.Workers()) == 0 })
}

func TestList(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	want := map[string]bool{}
	for i := range 7 {
		want[submit(t, c, broker.Request{Action: action(i)})] = true
	}
	token, pages := "", 0
	for {
		ops, next, err := c.List(t.Context(), 3, token)
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range ops {
			if !want[op.Name] {
				t.Errorf("operation %s listed twice or unknown", op.Name)
			}
			delete(want, op.Name)
		}
		pages++
		if token = next; token == "" {
			break
		}
	}
	if len(want) != 0 || pages != 3 {
		t.Errorf("%d operations not listed, %d pages, want 0 and 3", len(want), pages)
	}
	if _, _, err := c.List(t.Context(), 3, "x"); !errors.Is(err, broker.ErrInvalid) {
		t.Errorf("List with a foreign token = %v, want ErrInvalid", err)
	}
}

// TestCluster: operations work on three servers with three copies, and go on after one has died.
func TestCluster(t *testing.T) {
	t.Parallel()
	cluster := brokertest.StartCluster(t, 3)
	c := cluster[0].ClientWith(t, broker.Config{Replicas: 3})
	if c.Replicas() != 3 {
		t.Fatalf("%d replicas, want 3", c.Replicas())
	}
	second := cluster[1].Client(t) // keeps the replicas that are there
	if second.Replicas() != 3 {
		t.Fatalf("%d replicas seen by the second client, want 3", second.Replicas())
	}
	q := brokertest.Queue(t, second, worker("w1"))
	operation := submit(t, c, broker.Request{Action: action(1)})
	settle(t, begin(t, q), 0)
	terminal(t, c, operation)

	cluster[2].Server.Stop()
	for i := range 10 {
		operation := submit(t, c, broker.Request{Action: action(10 + i)})
		settle(t, begin(t, q), 0)
		terminal(t, second, operation)
	}
}

// TestOpenWaitsForTheCluster: a process may be started before the broker knows all of its cluster's servers.
func TestOpenWaitsForTheCluster(t *testing.T) {
	t.Parallel()
	cluster := brokertest.StartCluster(t, 3)
	cluster[0].ClientWith(t, broker.Config{Replicas: 3})
	c, err := broker.New(broker.Config{Conn: cluster[0].Connect(t), Replicas: 5, Log: quiet})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	ctx, cancel := contextWithTimeout(t, 2*time.Second)
	defer cancel()
	if err := c.Open(ctx); !errors.Is(err, context.Cause(ctx)) || !strings.Contains(err.Error(), "no suitable peers") {
		t.Errorf("Open where two servers are not there yet = %v, want one that waits", err)
	}
}

func TestServerRefusesWhatCannotWork(t *testing.T) {
	farm := brokertest.Start(t)
	address := strings.TrimPrefix(farm.URL(), "nats://")
	for _, cfg := range []broker.ServerConfig{
		{Listen: address},
		{Listen: "127.0.0.1:99999"},
		{Listen: "nowhere"},
		{File: t.TempDir() + "/none"},
	} {
		cfg.Dir, cfg.Log = t.TempDir(), quiet
		if s, err := broker.StartServer(t.Context(), cfg); err == nil {
			s.Stop()
			t.Errorf("StartServer(%+v) succeeded", cfg)
		}
	}
}

func TestConnectWaitsForItsContextOnly(t *testing.T) {
	ctx, cancel := contextWithTimeout(t, 300*time.Millisecond)
	defer cancel()
	_, err := broker.Connect(ctx, broker.ConnectConfig{Servers: []string{"nats://127.0.0.1:1"}, Log: quiet})
	if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("Connect to nobody = %v, want an error that names the server", err)
	}
}
