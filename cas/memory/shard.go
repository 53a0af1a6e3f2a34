package memory

import (
	"sync"
	"sync/atomic"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// item is a blob that is held.
type item struct {
	digest digest.Digest
	data   []byte

	used     atomic.Bool // since the hand went by
	verified atomic.Bool // data has the digest

	older, newer *item // guarded by shard.mu
}

// overhead is what a blob takes beside its bytes: its item, the hash and a share of the map.
const overhead = 320

func cost(d digest.Digest) int64 { return d.Size() + overhead }

// shard is a part of the tier with a lock of its own. It evicts by SIEVE: blobs stand in a queue in
// the order of their arrival, a use only marks one, and a hand that goes from the oldest to the
// newest takes the first that is not marked and clears the marks on its way. So a use takes the lock
// for reading only, and a sweep over many blobs that are read once does not throw out those that are
// read again and again.
type shard struct {
	mu    sync.RWMutex // guards the rest
	items map[digest.Digest]*item
	max   int64
	held  int64 // the sum of the costs

	oldest, newest *item
	hand           *item
}

// get returns a blob and marks it as used.
func (s *shard) get(d digest.Digest) *item {
	s.mu.RLock()
	i := s.items[d]
	s.mu.RUnlock()
	if i != nil && !i.used.Load() {
		i.used.Store(true)
	}
	return i
}

// add takes a blob, unless it is there, and returns how many others had to go.
func (s *shard) add(i *item) (evicted int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	need := cost(i.digest)
	if s.items[i.digest] != nil || need > s.max {
		return 0
	}
	for s.held+need > s.max {
		s.evict()
		evicted++
	}
	s.items[i.digest] = i
	s.held += need
	i.older = s.newest
	if s.newest != nil {
		s.newest.newer = i
	} else {
		s.oldest = i
	}
	s.newest = i
	return evicted
}

// drop forgets a blob, if it is still this one.
func (s *shard) drop(i *item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.items[i.digest] == i {
		s.remove(i)
	}
}

// evict removes one blob; there is one.
func (s *shard) evict() {
	i := s.hand
	if i == nil {
		i = s.oldest
	}
	for i.used.Swap(false) {
		if i = i.newer; i == nil {
			i = s.oldest
		}
	}
	s.hand = i
	s.remove(i)
}

func (s *shard) remove(i *item) {
	if s.hand == i {
		s.hand = i.newer
	}
	if i.older != nil {
		i.older.newer = i.newer
	} else {
		s.oldest = i.newer
	}
	if i.newer != nil {
		i.newer.older = i.older
	} else {
		s.newest = i.older
	}
	delete(s.items, i.digest)
	s.held -= cost(i.digest)
}
