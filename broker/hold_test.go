package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// build returns the request of a build's action number n.
func build(name string, n int) broker.Request {
	return broker.Request{
		Action:   space.Of(fmt.Appendf(nil, "%s %d", name, n)),
		Metadata: &repb.RequestMetadata{ToolInvocationId: "step of " + name, CorrelatedInvocationsId: name},
	}
}

// runner runs jobs one after the other in each of its slots and notes the order in which they began.
type runner struct {
	mu    sync.Mutex
	began []string // guarded by mu; operations
	group errgroup.Group
	stop  context.CancelCauseFunc
	gate  chan struct{} // a job ends for each value
}

func startRunner(t testing.TB, farm *brokertest.Farm, slots int) *runner {
	t.Helper()
	r := &runner{gate: make(chan struct{})}
	ctx, stop := context.WithCancelCause(t.Context())
	r.stop = stop
	for i := range slots {
		q := brokertest.Queue(t, farm.Client(t), worker("w"+itoa(i)))
		r.group.Go(func() error {
			return serve(ctx, q, func(l *broker.Lease) error {
				r.mu.Lock()
				r.began = append(r.began, l.Job().Operation)
				r.mu.Unlock()
				select {
				case <-r.gate:
				case <-ctx.Done():
				}
				return l.Settle(ctx, outcome(0))
			})
		})
	}
	t.Cleanup(func() {
		stop(nil)
		if err := r.group.Wait(); err != nil {
			t.Errorf("worker: %v", err)
		}
	})
	return r
}

// order returns the operations that have begun, once there are n.
func (r *runner) order(t testing.TB, n int) []string {
	t.Helper()
	eventually(t, itoa(n)+" operations have begun", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.began) >= n
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.began)
}

// finish lets n jobs end, each after the one before it has been replaced.
func (r *runner) finish(t testing.TB, slots, n int) {
	t.Helper()
	for range n {
		begun := len(r.order(t, slots))
		r.gate <- struct{}{}
		r.order(t, begun+1)
	}
}

// TestSmallBuildPassesALargeOne: 20 actions that come after very many wait for no more than a few rounds
// of what runs (rows EXA-27 and EXA-28).
func TestSmallBuildPassesALargeOne(t *testing.T) {
	t.Parallel()
	const slots, large, small = 8, 1000, 20
	farm := brokertest.Start(t)
	c := farm.Client(t)
	r := startRunner(t, farm, slots)
	for i := range large {
		submit(t, c, build("large", i))
	}
	r.finish(t, slots, 100) // its first actions were a small build as well
	before := len(r.order(t, slots))
	mine := map[string]bool{}
	for i := range small {
		mine[submit(t, c, build("small", i))] = true
	}
	r.finish(t, slots, 3*slots)
	began := 0
	for _, operation := range r.order(t, before+3*slots)[before:] {
		if mine[operation] {
			began++
		}
	}
	if began < small*19/20 {
		t.Errorf("in the first three rounds of %d slots %d of the %d actions of the small build began", slots, began, small)
	}
}

// TestBuildsGetEqualShares: whatever each has waiting, and through whichever process it came.
func TestBuildsGetEqualShares(t *testing.T) {
	t.Parallel()
	const builds, slots, most = 10, 4, 200
	farm := brokertest.Start(t)
	clients := []*broker.Client{farm.Client(t), farm.Client(t)}
	of := map[string]int{}
	for b := range builds {
		for i := range most / (1 + b%2) { // every other has half as many
			of[submit(t, clients[b/(builds*3/4)], build("build "+itoa(b), i))] = b
		}
	}
	acquainted(t, clients...)
	r := startRunner(t, farm, slots)
	const ran = builds * 60
	r.finish(t, slots, ran)
	shares := make([]int, builds)
	for _, operation := range r.order(t, ran)[:ran] {
		shares[of[operation]]++
	}
	for b, n := range shares {
		if n < 48 || n > 72 {
			t.Errorf("of %d actions %d were of build %d: %v, want 60 of each within 20 %%", ran, n, b, shares)
			break
		}
	}
}

// TestPriorityWithinABuild: the values decide, not only their sign.
func TestPriorityWithinABuild(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	const first, more = 64, 60
	for i := range first { // what comes before these in the lane
		submit(t, c, build("a", i))
	}
	priority := map[string]int32{}
	for i := range more {
		request := build("a", first+i)
		request.Priority = int32(1 + (i*7)%more)
		priority[submit(t, c, request)] = request.Priority
	}
	r := startRunner(t, farm, 1)
	r.finish(t, 1, first+more-1)
	var order []int32
	for _, operation := range r.order(t, first+more) {
		if priority[operation] > 0 {
			order = append(order, priority[operation])
		}
	}
	if len(order) != more {
		t.Fatalf("%d of %d ran", len(order), more)
	}
	// The first few were let in before the others came.
	if rest := order[10:]; !slices.IsSorted(rest) {
		t.Errorf("priorities ran in the order %v", order)
	}
}

// TestHeldJobsSurviveTheirHolder: another process lets them in, whether somebody watches them or not.
func TestHeldJobsSurviveTheirHolder(t *testing.T) {
	farm := brokertest.Start(t)
	const n = 50
	farm.Client(t)
	farm.Messages(t, "JOBS") // connects for all of the test
	var operations []string
	t.Run("holder", func(t *testing.T) { // at whose end it stops
		c := farm.Client(t)
		for i := range n {
			operations = append(operations, submit(t, c, build("a", i)))
		}
		if held := farm.Messages(t, "HELD"); held == 0 {
			t.Fatal("nothing is held")
		}
	})
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	for range n {
		settle(t, begin(t, q), 0)
	}
	for _, operation := range operations {
		terminal(t, c, operation)
	}
	eventually(t, "nothing is held", func() bool { return farm.Messages(t, "HELD") == 0 })
	nothingLeft(t, farm)
}

// TestEndOfHeldOperations: what is cancelled while it is held leaves nothing and does not run.
func TestEndOfHeldOperations(t *testing.T) {
	farm := brokertest.Start(t)
	c, other := farm.Client(t), farm.Client(t)
	var operations []string
	for i := range 60 {
		operations = append(operations, submit(t, c, build("a", i)))
	}
	for i, operation := range operations[:40] {
		by := c
		if i%2 == 0 {
			by = other
		}
		if err := by.Cancel(t.Context(), operation); err != nil {
			t.Fatal(err)
		}
	}
	q := brokertest.Queue(t, c, worker("w1"))
	for left := 20; left > 0; {
		l := next(t, q)
		err := l.Begin(t.Context())
		if errors.Is(err, broker.ErrLost) {
			continue // was let in when it was cancelled
		}
		if err != nil || slices.Index(operations, l.Job().Operation) < 40 {
			t.Fatalf("Begin of operation %d = %v", slices.Index(operations, l.Job().Operation), err)
		}
		settle(t, l, 0)
		left--
	}
	eventually(t, "nothing is held", func() bool { return farm.Messages(t, "HELD") == 0 })
	nothingLeft(t, farm)
}

// TestTenantsHaveBoundsOfTheirOwn: one that fills its share of the queue leaves the others theirs.
func TestTenantsHaveBoundsOfTheirOwn(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{MaxTenant: 20})
	full := errors.New("not full")
	for i := 0; i < 100 && !errors.Is(full, broker.ErrQueueFull); i++ {
		_, full = c.Submit(t.Context(), build("a", i))
	}
	if !errors.Is(full, broker.ErrQueueFull) {
		t.Fatalf("100 operations of one tenant ended with %v, want ErrQueueFull", full)
	}
	tenant := must(digest.SpaceOf("other/tenant", repb.DigestFunction_SHA256, ""))
	submit(t, c, broker.Request{Action: tenant.Of([]byte("action"))})
}

// TestLostNewsOfTakenJobs: the queue goes on although no worker tells that it has taken jobs.
func TestLostNewsOfTakenJobs(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.Client(t)
	const n = 40
	for i := range n {
		submit(t, c, build("a", i))
	}
	// Jobs that vanish tell nobody either.
	eventually(t, "all jobs have been in the queue", func() bool {
		farm.Purge(t, "JOBS")
		return farm.Messages(t, "HELD") == 0
	})
}
