package objectstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

const (
	// forwardBound is how long one question may take for copies. What is not copied then is reported
	// missing, and uploaded again.
	forwardBound = 5 * time.Second
	// forwardWidth is how many blobs of one question are copied at the same time.
	forwardWidth = 32
	// forwardBacklog bounds the blobs that wait to be copied in the background. Those beyond it are
	// copied when they are old.
	forwardBacklog = 1 << 13
	// forwardRest is how long the background rests after a copy, in durations of the copy, so that it
	// takes a quarter of one stream's time at most.
	forwardRest = 3
)

// forward is the copies under way and in wait.
type forward struct {
	waiting chan digest.Digest

	mu      sync.Mutex
	queued  map[key]struct{}      // guarded by mu; those in waiting
	flights map[key]chan struct{} // guarded by mu; those being copied; closed when done
}

func newForward() *forward {
	return &forward{
		waiting: make(chan digest.Digest, forwardBacklog),
		queued:  make(map[key]struct{}),
		flights: make(map[key]chan struct{}),
	}
}

// later queues a copy unless it waits already or too many do.
func (f *forward) later(k key, d digest.Digest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, again := f.queued[k]; again {
		return
	}
	select {
	case f.waiting <- d:
		f.queued[k] = struct{}{}
	default:
	}
}

// next takes one from the queue.
func (f *forward) taken(k key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.queued, k)
}

// join makes the caller the one who copies, or returns a channel that is closed when who does has
// ended.
func (f *forward) join(k key) (others <-chan struct{}, leave func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, ok := f.flights[k]; ok {
		return c, nil
	}
	c := make(chan struct{})
	f.flights[k] = c
	return nil, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.flights, k)
		close(c)
	}
}

// touched has a blob copied in the background if its generation is aging.
func (s *Store) touched(k key, d digest.Digest) {
	if e, ok := s.index.get(k, d.Size()); ok && e.generation() <= s.known().Aging {
		s.forward.later(k, d)
	}
}

// keep copies a blob into the current generation unless it is in one above floor.
func (s *Store) keep(ctx context.Context, d digest.Digest, floor uint32) error {
	k := keyOf(d)
	for {
		e, ok := s.index.get(k, d.Size())
		switch {
		case !ok:
			return cas.ErrNotFound
		case e.generation() > floor:
			return nil
		}
		others, leave := s.forward.join(k)
		if leave != nil {
			defer leave()
			return s.copy(ctx, d, e.generation())
		}
		select {
		case <-others:
		case <-ctx.Done():
			return ended(ctx)
		}
	}
}

// copy stores what a generation has of a blob in the current one. The index then has the newer.
func (s *Store) copy(ctx context.Context, d digest.Digest, from uint32) error {
	g := s.generation(from)
	if g == nil {
		return fmt.Errorf("%w: generation %d is not known here", cas.ErrUnavailable, from)
	}
	ctx = context.WithValue(ctx, copying{}, true)
	r, err := s.openIn(ctx, g, d, span{}, true)
	if err != nil {
		return err
	}
	err = s.putNew(ctx, d, noUpload, r)
	if err := errors.Join(err, r.Close()); err != nil {
		s.metrics.copyFailures.Inc()
		return err
	}
	s.metrics.copiedBlobs.Inc()
	s.metrics.copiedBytes.Add(float64(d.Size()))
	return nil
}

// keepAll copies what is still in a generation up to floor, as far as that can be done within bounds.
func (s *Store) keepAll(ctx context.Context, ds []digest.Digest, floor uint32) {
	var group errgroup.Group
	group.SetLimit(forwardWidth)
	for _, d := range ds {
		group.Go(func() error {
			if err := s.keep(ctx, d, floor); err != nil && !errors.Is(err, cas.ErrNotFound) {
				s.cfg.Log.DebugContext(ctx, "a blob was not copied forward", "blob", d.String(), "err", err)
			}
			return nil
		})
	}
	_ = group.Wait() //nolint:errcheck // none returns an error
}

// carry copies what is used of aging generations until ctx ends.
func (s *Store) carry(ctx context.Context) error {
	for {
		select {
		case d := <-s.forward.waiting:
			s.forward.taken(keyOf(d))
			began := time.Now()
			if err := s.keep(ctx, d, s.known().Aging); err != nil {
				s.cfg.Log.DebugContext(ctx, "a blob was not copied forward", "blob", d.String(), "err", err)
			}
			if err := pause(ctx, forwardRest*time.Since(began)); err != nil {
				return err
			}
		case <-ctx.Done():
			return ended(ctx)
		}
	}
}
