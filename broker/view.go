package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
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
	shapes  map[string]seenShape  // guarded by mu, by key in the bucket
	pools   map[string]Platform   // guarded by mu, by pool
	routes  routes                // guarded by mu; what follows from workers and shapes
	changed chan struct{}         // guarded by mu; closed and replaced when pools or declared properties change
}

type seenWorker struct {
	info WorkerInfo
	at   time.Time
}

func (v *view) init() {
	v.workers, v.pools, v.changed = map[string]seenWorker{}, map[string]Platform{defaultPool: nil}, make(chan struct{})
	v.shapes = map[string]seenShape{}
}

// Run follows the registries of workers and pools, holds back jobs whose turn has not come, cancels
// operations that their last watcher left in this process, removes pools that nobody has used for long, and
// mends what other processes left undone, until
// ctx ends. Without it a client knows no workers and only the pools that it has
// made.
func (c *Client) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.follow(ctx, c.registry, c.view.sawWorker) })
	group.Go(func() error { return c.follow(ctx, c.pools, c.view.sawPool) })
	group.Go(func() error { return c.follow(ctx, c.shapes, c.view.sawShape) })
	group.Go(func() error { return c.sweepPools(ctx) })
	group.Go(func() error { return c.cancelAbandoned(ctx) })
	group.Go(func() error { return c.answerForBusy(ctx) })
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
		v.dropPool(entry.Key())
		return
	}
	v.addPool(entry.Key(), platform)
}

func (v *view) dropPool(pool string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.pools[pool]; known && pool != defaultPool {
		delete(v.pools, pool)
		v.announce()
	}
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
	v.routes.reset()
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
	v.mu.Lock()
	defer v.mu.Unlock()
	w, known := v.workers[worker]
	return known && time.Since(w.at) <= workerTTL
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
			v.routes.reset()
			continue
		}
		workers = append(workers, w.info)
	}
	slices.SortFunc(workers, func(a, b WorkerInfo) int { return cmp.Compare(a.Name, b.Name) })
	return workers
}

// Workers returns the live workers, as far as Run has heard of them.
func (c *Client) Workers() []WorkerInfo { return c.view.live() }
