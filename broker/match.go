package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Which workers may run an action follows from what the action asks for and what workers declare. A worker
// is right when it has every property that is asked for. Properties that no worker declares, and none
// has declared for shapeTTL, do not choose between workers and are ignored. Workers that have left are
// remembered for that long, so that the actions for a kind of worker that is scaled to zero wait for it
// and do not run on others.

const (
	// shapeTTL is how long the farm remembers what a worker has declared.
	shapeTTL = 7 * 24 * time.Hour
	// shapeBeat is how often a worker says it again.
	shapeBeat = time.Hour
	// routeAge bounds how long what was found out holds: workers that die silently are not announced.
	routeAge = time.Second
	// maxRoutes bounds how much of it is kept.
	maxRoutes = 1024
	// strangerShare is the part of the patience that actions have for what no worker has offered for shapeTTL.
	strangerShare = 10
)

type seenShape struct {
	platform Platform
	at       time.Time
}

func (v *view) sawShape(entry jetstream.KeyValueEntry) {
	var platform Platform
	deleted := entry.Operation() != jetstream.KeyValuePut || json.Unmarshal(entry.Value(), &platform) != nil
	v.mu.Lock()
	defer v.mu.Unlock()
	_, known := v.shapes[entry.Key()]
	if deleted {
		delete(v.shapes, entry.Key())
	} else {
		v.shapes[entry.Key()] = seenShape{platform: platform, at: entry.Created()}
	}
	if known == deleted {
		v.announce()
	}
}

// remembered returns what workers have declared within shapeTTL, whether they are live or not.
func (v *view) remembered() []Platform {
	v.mu.Lock()
	defer v.mu.Unlock()
	platforms := make([]Platform, 0, len(v.shapes)+len(v.workers))
	for key, shape := range v.shapes {
		if time.Since(shape.at) > shapeTTL {
			delete(v.shapes, key)
			continue
		}
		platforms = append(platforms, shape.platform)
	}
	for _, w := range v.workers {
		platforms = append(platforms, w.info.Platform)
	}
	return platforms
}

// route is where the jobs of a platform go.
type route struct {
	// pool is what counts of the platform, in the form that is the same for all who ask for as much.
	pool Platform
	// refused is nil, or an ErrNoWorker that says why no live worker can serve the platform.
	refused error
	// stranger says that no worker could serve it for shapeTTL.
	stranger bool
}

// poolName is the pool's token in subjects.
func (r route) poolName() string {
	if r.stranger {
		return strangerPool
	}
	return r.pool.pool()
}

// routes are those that were found lately.
type routes struct {
	by         map[string]route
	since      time.Time
	generation int
}

func (r *routes) reset() {
	clear(r.by)
	r.generation++
}

// route finds where the jobs of a platform go. It is asked for every Execute and every heartbeat of
// what is queued, so what was found is kept for a moment.
func (v *view) route(p Platform) route {
	if len(p) == 0 {
		return route{}
	}
	key := p.String()
	v.mu.Lock()
	if v.routes.by == nil {
		v.routes.by = map[string]route{}
	}
	if time.Since(v.routes.since) > routeAge || len(v.routes.by) >= maxRoutes {
		v.routes.reset()
		v.routes.since = time.Now()
	}
	found, ok := v.routes.by[key]
	generation := v.routes.generation
	v.mu.Unlock()
	if ok {
		return found
	}
	found = v.find(p)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.routes.generation == generation {
		v.routes.by[key] = found
	}
	return found
}

func (v *view) find(p Platform) route {
	workers, remembered := v.live(), v.remembered()
	if len(remembered) == 0 {
		return route{pool: p} // nobody has declared anything yet
	}
	declared := declaredBy(remembered)
	r := route{pool: p.relevant(declared, remembered)}
	r.stranger = !slices.ContainsFunc(remembered, func(have Platform) bool { return len(have.missing(p, declared)) == 0 })
	if len(workers) > 0 && !slices.ContainsFunc(workers, func(w WorkerInfo) bool { return len(w.Platform.missing(p, declared)) == 0 }) {
		r.refused = refusal(p, declared, workers, r.stranger)
	}
	return r
}

// refusal says why none of the workers is right: how the one that comes nearest differs.
func refusal(p Platform, declared map[string]bool, workers []WorkerInfo, stranger bool) error {
	var nearest WorkerInfo
	var lacks []Property
	for _, w := range workers {
		missing := w.Platform.missing(p, declared)
		if lacks == nil || len(missing) < len(lacks) || len(missing) == len(lacks) && w.Platform.excess(missing) < nearest.Platform.excess(lacks) {
			nearest, lacks = w, missing
		}
	}
	parts := make([]string, len(lacks))
	for i, want := range lacks {
		parts[i] = fmt.Sprintf("%s is %s, the action asks for %s", digest.Quote(want.Name), nearest.Platform.values(want.Name), digest.Quote(want.Value))
		if _, number := want.number(); !number && nearest.Platform.bounds(want.Name) {
			parts[i] += ", which is not a number"
		}
	}
	hint := "no worker has offered it for a week"
	if !stranger {
		hint = "workers that do were here within a week and may come back"
	}
	return fmt.Errorf("%w; the nearest is %s: %s; %s", ErrNoWorker, nearest.Name, strings.Join(parts, "; "), hint)
}

// servable returns ErrNoWorker when there are live workers and none of them can serve p. Without
// any worker an action waits for one.
func (v *view) servable(p Platform) error { return v.route(p).refused }

// serving returns the live workers that take jobs of a platform.
func (v *view) serving(p Platform) []WorkerInfo {
	declared := declaredBy(v.remembered())
	return slices.DeleteFunc(v.live(), func(w WorkerInfo) bool {
		return w.Draining || w.Trouble != "" || len(w.Platform.missing(p, declared)) > 0
	})
}

// serves returns the pools that a worker with platform p takes jobs from, in a stable order, and a
// channel that is closed when the answer may have changed.
func (v *view) serves(self Platform) (pools []string, changed <-chan struct{}) {
	declared := declaredBy(v.remembered())
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

func declaredBy(platforms []Platform) map[string]bool {
	declared := map[string]bool{}
	for _, p := range platforms {
		p.names(declared)
	}
	return declared
}

// patienceFor is how long an operation waits for a worker that can serve it while there are only others.
func (c *Client) patienceFor(r route) time.Duration {
	patience := max(c.patience, 0)
	if r.stranger {
		patience /= strangerShare
	}
	return patience
}

// remember makes the farm remember what this worker declares, after it has left.
func (q *Queue) remember(ctx context.Context) error {
	q.mu.Lock()
	due := len(q.self.Platform) > 0 && time.Since(q.shaped) >= shapeBeat
	q.mu.Unlock()
	if !due {
		return nil
	}
	value, err := json.Marshal(q.self.Platform)
	if err == nil {
		_, err = q.c.shapes.Put(ctx, q.self.Platform.pool(), value)
	}
	if err == nil {
		q.mu.Lock()
		q.shaped = time.Now()
		q.mu.Unlock()
	}
	return err
}
