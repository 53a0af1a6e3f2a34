package broker_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// TestHoldersThatSpeakNonsense change nothing for others.
func TestHoldersThatSpeakNonsense(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	for i := range 60 {
		submit(t, c, build("a", i))
	}
	nc := farm.Connect(t)
	for i, text := range []string{`{"any":-1}`, `{"any":-9223372036854775808}`, `{"any":9223372036854775807}`} {
		name := strings.Repeat(string(rune('A'+i)), 26)
		said := fmt.Sprintf(`{"holder":%q,"builds":%s,"flows":{"any":{"x":-1,"":9223372036854775807}},"tenants":{"":9223372036854775807}}`, name, text)
		if err := nc.Publish("jetfarm.flows", []byte(said)); err != nil {
			t.Fatal(err)
		}
	}
	pauseFor(t, 1500*time.Millisecond) // until it has thought about that
	q := brokertest.Queue(t, c, worker("w1"))
	for range 60 {
		settle(t, begin(t, q), 0)
	}
	nothingLeft(t, farm)
}

// TestLostNewsAmongOthers: a process goes on although it was not told that its jobs were taken, while
// another one keeps the same lanes full.
func TestLostNewsAmongOthers(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c, other := farm.Client(t), farm.Client(t)
	mine := map[string]bool{}
	for i := range 60 {
		mine[submit(t, c, build("a", i))] = true
	}
	js := must(jetstream.New(farm.Connect(t)))
	for lane := 1; lane <= 2; lane++ {
		batch := must(must(js.Consumer(t.Context(), "JOBS", "any-"+itoa(lane))).Fetch(100, jetstream.FetchMaxWait(100*time.Millisecond)))
		for msg := range batch.Messages() { // taken by somebody who tells nobody
			if err := msg.Ack(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range 60 {
		submit(t, other, build("b", i))
	}
	eventually(t, "more jobs of the first build are in the queue", func() bool {
		for _, job := range farm.All(t, "JOBS") {
			if mine[job.Subject[strings.LastIndexByte(job.Subject, '.')+1:]] {
				return true
			}
		}
		return false
	})
}

// TestStopWhileTheBrokerIsSilent does not try to let everything in first.
func TestStopWhileTheBrokerIsSilent(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	p := startProxy(t, strings.TrimPrefix(farm.URL(), "nats://"))
	nc, err := broker.Connect(t.Context(), broker.ConnectConfig{Servers: []string{p.url()}, Name: "frontend", Log: farm.Log()})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c := must(broker.New(broker.Config{Conn: nc, Submits: true, Log: farm.Log()}))
	if err := c.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	var group errgroup.Group
	group.Go(func() error { return c.Run(ctx) })
	for i := range 300 {
		submit(t, c, build("a", i))
	}
	p.stall()
	c.Widen(300)
	eventually(t, "jobs are being let in", func() bool { return c.Held() == 0 })
	stop(nil)
	began := time.Now()
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("Run took %v to end", took)
	}
}

// TestOrphansBehindOthers: what a holder held of which nobody has ever heard is taken over, also when
// what is older is held by somebody alive.
func TestOrphansBehindOthers(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	for i := range 60 {
		submit(t, c, build("a", i))
	}
	before := c.Held()
	dying := farm.Deaf(t, broker.Config{Submits: true})
	for i := range 60 {
		submit(t, dying, build("b", i))
	}
	orphans := dying.Held()
	c.Adopt(t.Context())
	if got := c.Held(); before == 0 || orphans == 0 || got != before+orphans {
		t.Errorf("%d jobs are held after %d of a dead process were found behind %d", got, orphans, before)
	}
}

// acquainted returns when each has heard of all that the others hold.
func acquainted(t *testing.T, clients ...*broker.Client) {
	t.Helper()
	eventually(t, "they have heard of each other", func() bool {
		held := 0
		for _, c := range clients {
			held += c.Held()
		}
		return !slices.ContainsFunc(clients, func(c *broker.Client) bool { return c.Held() == 0 || c.Heard() != held-c.Held() })
	})
}

// TestOrphansHaveOneHeir: of several that look for what a dead holder held one takes each job over, so that
// an instance name does not seem to have more than it has.
func TestOrphansHaveOneHeir(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	clients := []*broker.Client{farm.Client(t), farm.Client(t), farm.Client(t)}
	var before []int
	for n, c := range clients {
		for i := range 60 {
			submit(t, c, build(itoa(n), i))
		}
		before = append(before, c.Held())
	}
	acquainted(t, clients...)
	dying := farm.Deaf(t, broker.Config{Submits: true})
	for i := range 60 {
		submit(t, dying, build("b", i))
	}
	want, after := dying.Held(), 0
	for n, c := range clients {
		if c.Adopt(t.Context()); c.Held() == before[n] {
			t.Error("a holder has taken nothing over")
		}
		want += before[n]
		c.Adopt(t.Context()) // takes no more
		after += c.Held()
	}
	if after != want {
		t.Errorf("%d jobs wait in three processes, want %d", after, want)
	}
}

// TestTenantsGetEqualShares: whatever number of builds each has, and through whichever process.
func TestTenantsGetEqualShares(t *testing.T) {
	t.Parallel()
	const slots = 4
	farm := brokertest.Start(t)
	clients := []*broker.Client{farm.Client(t), farm.Client(t)}
	of := map[string]string{}
	for n, tenant := range []string{"one", "nine"} {
		space := must(digest.SpaceOf(tenant, repb.DigestFunction_SHA256, ""))
		builds := 1 + 8*n
		for b := range builds {
			for i := range 450 / builds {
				request := build(tenant+itoa(b), i)
				request.Action = space.Of(fmt.Appendf(nil, "%d %d", b, i))
				of[submit(t, clients[n], request)] = tenant
			}
		}
	}
	acquainted(t, clients...)
	r := startRunner(t, farm, slots)
	const skip, ran = 350, 500 // first what was let in before: small builds pass by
	r.finish(t, slots, ran)
	shares := map[string]int{}
	for _, operation := range r.order(t, ran)[skip:ran] {
		shares[of[operation]]++
	}
	if n := shares["one"]; n < (ran-skip)*35/100 {
		t.Errorf("of %d actions the instance names have had %v, want half each", ran-skip, shares)
	}
}

// TestWatchingWhatIsHeldAsksNobody where its job is.
func TestWatchingWhatIsHeldAsksNobody(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{Heartbeat: 20 * time.Millisecond, MendAfter: time.Millisecond, Reconcile: 24 * time.Hour})
	var last string
	for i := range 300 { // so many that its turn is far away, however long the test takes
		last = submit(t, c, build("a", i))
	}
	nc := farm.Connect(t)
	asked := must(nc.SubscribeSync("$JS.API.DIRECT.GET.HELD.>"))
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	beats := 0
	for _, err := range c.Watch(t.Context(), last) {
		if err != nil {
			t.Fatal(err)
		}
		if beats++; beats == 10 {
			break
		}
	}
	if msg, err := asked.NextMsg(200 * time.Millisecond); err == nil {
		t.Errorf("a watcher has asked for %s", msg.Subject)
	}
}
