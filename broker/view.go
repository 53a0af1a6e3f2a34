package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// WorkerInfo is what a worker says of itself with each heartbeat.
type WorkerInfo struct {
	Name string `json:"name"`
	// Incarnation tells one life of a worker from the next.
	Incarnation string   `json:"incarnation"`
	Platform    Platform `json:"platform,omitempty"`
	Slots       int      `json:"slots"`
	Busy        int      `json:"busy"`
	Isolation   string   `json:"isolation,omitempty"`
	Draining    bool     `json:"draining,omitempty"`
	// Trouble says why the worker has taken itself out, if it has.
	Trouble string    `json:"trouble,omitempty"`
	Started time.Time `json:"started"`
}

const (
	// workerTTL is how long a worker counts as live after its last heartbeat.
	workerTTL = 15 * time.Second
	// workerBeat is how often a worker reports.
	workerBeat = 5 * time.Second
)

// view is what this process knows of workers and pools. It is a cache: nothing is lost when it is
// stale. Workers age by this process's clock alone.
type view struct {
	mu      sync.Mutex
	workers map[string]seenWorker // guarded by mu, by name
	pools   map[string]Platform   // guarded by mu, by pool
	changed chan struct{}         // guarded by mu; closed and replaced when pools or declared properties change
}

type seenWorker struct {
	info WorkerInfo
	at   time.Time
}

func (v *view) init() {
	v.workers, v.pools, v.changed = map[string]seenWorker{}, map[string]Platform{defaultPool: nil}, make(chan struct{})
}

// Run follows the registries of workers and pools, holds back jobs whose turn has not come, cancels
// operations that their last watcher left in this process, and mends what other processes left undone, until
// ctx ends. Without it a client knows no workers and only the pools that it has
// made.
func (c *Client) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.follow(ctx, c.registry, c.view.sawWorker) })
	group.Go(func() error { return c.follow(ctx, c.pools, c.view.sawPool) })
	group.Go(func() error { return c.cancelAbandoned(ctx) })
	group.Go(func() error { return c.reconcile(ctx) })
	group.Go(func() error { return c.hearAdvisories(ctx) })
	if c.submits {
		group.Go(func() error { return c.holdBack(ctx) })
	}
	if err := group.Wait(); ctx.Err() == nil {
		return err
	}
	return nil
}

// follow hands each entry of a bucket to see, now and as it changes, and starts again when the
// watch breaks.
func (c *Client) follow(ctx context.Context, kv jetstream.KeyValue, see func(jetstream.KeyValueEntry)) error {
	for attempt := 0; ; attempt++ {
		if err := followOnce(ctx, kv, c.gapped(), see); err != nil && ctx.Err() == nil {
			c.log.DebugContext(ctx, "watch bucket", "bucket", kv.Bucket(), "err", err)
		}
		if err := pause(ctx, attempt); err != nil {
			return nil //nolint:nilerr // the end of ctx is how Run is stopped
		}
	}
}

func followOnce(ctx context.Context, kv jetstream.KeyValue, gap <-chan struct{}, see func(jetstream.KeyValueEntry)) error {
	watcher, err := kv.WatchAll(ctx)
	if err != nil {
		return err
	}
	defer watcher.Stop() //nolint:errcheck // the watch is over, whatever the server answers
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-gap:
			return nil
		case entry, ok := <-watcher.Updates():
			if !ok {
				return nil
			}
			if entry != nil {
				see(entry)
			}
		}
	}
}

func (v *view) sawWorker(entry jetstream.KeyValueEntry) {
	var info WorkerInfo
	deleted := entry.Operation() != jetstream.KeyValuePut || json.Unmarshal(entry.Value(), &info) != nil || time.Since(entry.Created()) > 4*workerTTL
	v.mu.Lock()
	defer v.mu.Unlock()
	before, known := v.workers[entry.Key()]
	if deleted {
		delete(v.workers, entry.Key())
	} else {
		v.workers[entry.Key()] = seenWorker{info: info, at: time.Now()}
	}
	if known == deleted || !slices.Equal(before.info.Platform, info.Platform) {
		v.announce()
	}
}

func (v *view) sawPool(entry jetstream.KeyValueEntry) {
	var platform Platform
	if entry.Operation() != jetstream.KeyValuePut || json.Unmarshal(entry.Value(), &platform) != nil {
		return
	}
	v.addPool(entry.Key(), platform)
}

func (v *view) addPool(pool string, platform Platform) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.pools[pool]; !known {
		v.pools[pool] = platform
		v.announce()
	}
}

// announce is called with mu held.
func (v *view) announce() {
	close(v.changed)
	v.changed = make(chan struct{})
}

// platform returns what a pool's jobs ask for.
func (v *view) platform(pool string) Platform {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.pools[pool]
}

func (v *view) knows(pool string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, known := v.pools[pool]
	return known
}

func (v *view) poolNames() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Sorted(maps.Keys(v.pools))
}

// lives tells whether a worker was heard of lately.
func (v *view) lives(worker string) bool {
	return slices.ContainsFunc(v.live(), func(w WorkerInfo) bool { return w.Name == worker })
}

func (v *view) poolCount() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.pools)
}

// live returns the workers that were heard of lately, in the order of their names.
func (v *view) live() []WorkerInfo {
	v.mu.Lock()
	defer v.mu.Unlock()
	workers := make([]WorkerInfo, 0, len(v.workers))
	for name, w := range v.workers {
		if time.Since(w.at) > workerTTL {
			delete(v.workers, name)
			continue
		}
		workers = append(workers, w.info)
	}
	slices.SortFunc(workers, func(a, b WorkerInfo) int { return cmp.Compare(a.Name, b.Name) })
	return workers
}

// Workers returns the live workers, as far as Run has heard of them.
func (c *Client) Workers() []WorkerInfo { return c.view.live() }

// servable returns ErrNoWorker when there are live workers and none of them can serve p. Without
// any worker an action waits for one.
func (v *view) servable(p Platform) error {
	workers := v.live()
	if len(workers) == 0 || len(p) == 0 {
		return nil
	}
	declared := declaredBy(workers)
	var nearest WorkerInfo
	var lacks []Property
	for _, w := range workers {
		missing := w.Platform.missing(p, declared)
		if len(missing) == 0 {
			return nil
		}
		if lacks == nil || len(missing) < len(lacks) {
			nearest, lacks = w, missing
		}
	}
	parts := make([]string, len(lacks))
	for i, want := range lacks {
		parts[i] = fmt.Sprintf("%s is %s, the action asks for %s", want.Name, nearest.Platform.values(want.Name), digest.Quote(want.Value))
	}
	return fmt.Errorf("%w; the nearest is %s: %s", ErrNoWorker, nearest.Name, strings.Join(parts, "; "))
}

// relevant returns the properties of p that some live worker declares, or p when there is none.
func (v *view) relevant(p Platform) Platform {
	workers := v.live()
	if len(workers) == 0 {
		return p
	}
	declared := declaredBy(workers)
	return slices.DeleteFunc(slices.Clone(p), func(property Property) bool { return !declared[property.Name] })
}

func declaredBy(workers []WorkerInfo) map[string]bool {
	declared := map[string]bool{}
	for _, w := range workers {
		w.Platform.names(declared)
	}
	return declared
}

// serves returns the pools that a worker with platform p takes jobs from, in a stable order, and a
// channel that is closed when the answer may have changed.
func (v *view) serves(self Platform) (pools []string, changed <-chan struct{}) {
	declared := declaredBy(v.live())
	self.names(declared)
	v.mu.Lock()
	defer v.mu.Unlock()
	for pool, asked := range v.pools {
		if len(self.missing(asked, declared)) == 0 {
			pools = append(pools, pool)
		}
	}
	slices.Sort(pools)
	return pools, v.changed
}
