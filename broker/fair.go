package broker

import (
	"container/heap"
	"maps"
	"slices"
)

// fairQueue gives waiting jobs out in fair order: tenants take turns, the builds of a tenant take turns,
// and within a build the lower priority value goes first, then the earlier job. Each step costs the
// logarithm of what one build has waiting, whatever else waits. It is not safe for concurrent use.
type fairQueue struct {
	turns  turns[*tenantQueue]
	named  map[string]*tenantQueue
	size   int
	builds int // that have something waiting
	last   uint64
}

// flow is who a job waits for: a build, which is one invocation of a client or several that say they
// belong together, of a tenant, which is an instance name.
type flow struct{ tenant, build string }

// waiting is a job in a fairQueue.
type waiting struct {
	operation string
	flow      flow
	priority  int32
	pool      string
	lane      int
	sequence  uint64 // of the stored copy
	payload   []byte // nil when it has to be read from there
	arrived   uint64
	gone      bool // was removed and is skipped
}

type tenantQueue struct {
	name   string
	turns  turns[*buildQueue]
	named  map[string]*buildQueue
	builds int // that have something waiting; the others are dropped when it is their turn
}

type buildQueue struct {
	name string
	jobs jobHeap
	size int // without those that are gone
}

func (q *fairQueue) push(w *waiting) {
	if q.named == nil {
		q.named = map[string]*tenantQueue{}
	}
	tenant := q.named[w.flow.tenant]
	if tenant == nil {
		tenant = &tenantQueue{name: w.flow.tenant, named: map[string]*buildQueue{}}
		q.named[tenant.name] = tenant
		q.turns.add(tenant)
	}
	build := tenant.named[w.flow.build]
	if build == nil {
		build = &buildQueue{name: w.flow.build}
		tenant.named[build.name] = build
		tenant.turns.add(build)
	}
	q.last++
	w.arrived = q.last
	heap.Push(&build.jobs, w)
	if build.size++; build.size == 1 {
		q.count(tenant, 1)
	}
	q.size++
}

// remove takes a job out that is in the queue. What stays of it is skipped when its turn comes, or dropped
// when there is more of that than of what waits: nobody knows when a turn comes.
func (q *fairQueue) remove(w *waiting) {
	w.gone, w.payload = true, nil
	q.size--
	tenant := q.named[w.flow.tenant]
	build := tenant.named[w.flow.build]
	if build.size--; build.size == 0 {
		build.jobs = nil
		q.count(tenant, -1)
	}
	if len(build.jobs) > maxLeftovers+2*build.size {
		build.jobs = slices.DeleteFunc(build.jobs, func(w *waiting) bool { return w.gone })
		heap.Init(&build.jobs)
	}
	if len(tenant.named) > maxLeftovers+2*tenant.builds {
		tenant.turns.drop(func(b *buildQueue) bool { return b.size == 0 })
		maps.DeleteFunc(tenant.named, func(_ string, b *buildQueue) bool { return b.size == 0 })
	}
	if len(q.named) > maxLeftovers+2*q.builds {
		q.turns.drop(func(t *tenantQueue) bool { return t.builds == 0 })
		maps.DeleteFunc(q.named, func(_ string, t *tenantQueue) bool { return t.builds == 0 })
	}
}

// maxLeftovers is how much of what was removed may stay in any case.
const maxLeftovers = 16

// count notes that a build of a tenant has got its first job or lost its last.
func (q *fairQueue) count(tenant *tenantQueue, n int) {
	tenant.builds += n
	q.builds += n
}

// pop returns whose turn it is, or nil when nothing waits.
func (q *fairQueue) pop() *waiting {
	for {
		tenant, ok := q.turns.next()
		if !ok {
			return nil
		}
		before := tenant.builds
		w := tenant.pop()
		q.builds += tenant.builds - before
		if w != nil {
			q.size--
		}
		if len(tenant.named) > 0 {
			q.turns.add(tenant)
		} else {
			delete(q.named, tenant.name)
		}
		if w != nil {
			return w
		}
	}
}

func (t *tenantQueue) pop() *waiting {
	for {
		build, ok := t.turns.next()
		if !ok {
			return nil
		}
		w := build.pop()
		if build.size > 0 {
			t.turns.add(build)
		} else {
			delete(t.named, build.name)
		}
		if w != nil && build.size == 0 {
			t.builds--
		}
		if w != nil {
			return w
		}
	}
}

func (b *buildQueue) pop() *waiting {
	for len(b.jobs) > 0 {
		w, _ := heap.Pop(&b.jobs).(*waiting) //nolint:errcheck // nothing else is pushed
		if !w.gone {
			b.size--
			return w
		}
	}
	return nil
}

// turns is a first-in first-out list.
type turns[T any] struct{ in, out []T }

func (t *turns[T]) add(v T) { t.in = append(t.in, v) }

func (t *turns[T]) next() (v T, ok bool) {
	if len(t.out) == 0 {
		for _, v := range slices.Backward(t.in) {
			t.out = append(t.out, v)
		}
		clear(t.in)
		t.in = t.in[:0]
	}
	if len(t.out) == 0 {
		return v, false
	}
	last := len(t.out) - 1
	var none T
	v, t.out[last] = t.out[last], none
	t.out = t.out[:last]
	return v, true
}

// drop takes out what gone tells of.
func (t *turns[T]) drop(gone func(T) bool) {
	t.in, t.out = slices.DeleteFunc(t.in, gone), slices.DeleteFunc(t.out, gone)
}

// jobHeap orders the jobs of a build.
type jobHeap []*waiting

func (h *jobHeap) Len() int { return len(*h) }

func (h *jobHeap) Less(i, j int) bool {
	a, b := (*h)[i], (*h)[j]
	if a.priority != b.priority {
		return a.priority < b.priority
	}
	return a.arrived < b.arrived
}

func (h *jobHeap) Swap(i, j int) { (*h)[i], (*h)[j] = (*h)[j], (*h)[i] }

func (h *jobHeap) Push(v any) { *h = append(*h, v.(*waiting)) } //nolint:forcetypeassert,errcheck // called by push alone

func (h *jobHeap) Pop() any {
	last := len(*h) - 1
	w := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return w
}
