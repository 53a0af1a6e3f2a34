package objectstore

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
)

const (
	// newsDelay is how long an announcement waits for company.
	newsDelay = 5 * time.Millisecond
	// newsChannel is how many messages of others wait to be applied.
	newsChannel = 1024
	// repairDelay and repairDelayMax bound the pause after a listing that failed.
	repairDelay    = 250 * time.Millisecond
	repairDelayMax = 30 * time.Second
)

// Run tells other processes what this one stores, and keeps the index current with what they tell.
// It lists the current generation when it starts and after every time that announcements may have
// been lost. It returns nil after ctx has ended.
func (s *Store) Run(ctx context.Context) error {
	arriving := make(chan *nats.Msg, newsChannel)
	sub, err := s.cfg.Small.ChanSubscribe(SubjectIndex, arriving)
	if err != nil {
		return fmt.Errorf("objectstore: %w", brokerError(ctx, err))
	}
	slow := sub.StatusChanged(nats.SubscriptionSlowConsumer)
	connected := s.cfg.Small.StatusChanged(nats.CONNECTED)
	defer s.cfg.Small.RemoveStatusListener(connected)

	gap := make(chan struct{}, 1)
	gap <- struct{}{} // what was stored since Open listed it
	group, bound := errgroup.WithContext(ctx)
	group.Go(func() error { return s.announce(bound) })
	group.Go(func() error { return s.listen(bound, arriving, slow, connected, gap) })
	group.Go(func() error { return s.repair(bound, gap) })
	err = group.Wait()
	if e := sub.Unsubscribe(); e != nil && !s.cfg.Small.IsClosed() {
		s.cfg.Log.WarnContext(ctx, "unsubscribe from announcements", "err", e)
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// announce publishes the news until ctx ends, the last of them after that.
func (s *Store) announce(ctx context.Context) error {
	for {
		var err error
		select {
		case <-s.news.wake:
			err = pause(ctx, newsDelay)
		case <-ctx.Done():
			err = ended(ctx)
		}
		for batch := range slices.Chunk(s.news.take(), newsRecords) {
			if err := s.cfg.Small.Publish(SubjectIndex, encodeNews(s.news.sender, batch)); err != nil {
				s.metrics.lostAnnouncements.Add(float64(len(batch)))
				s.cfg.Log.DebugContext(ctx, "announcements are lost", "blobs", len(batch), "err", err)
			}
		}
		if err != nil {
			return err
		}
	}
}

// listen applies announcements until ctx ends, and says so when some may have been lost.
func (s *Store) listen(ctx context.Context, arriving <-chan *nats.Msg, slow <-chan nats.SubStatus, connected <-chan nats.Status, gap chan<- struct{}) error {
	for {
		lost := true
		select {
		case m := <-arriving:
			s.apply(m.Data)
			lost = false
		case _, ok := <-slow:
			if !ok {
				slow = nil
			}
		case _, ok := <-connected:
			if !ok {
				connected = nil
			}
		case <-ctx.Done():
			return ended(ctx)
		}
		if lost {
			select {
			case gap <- struct{}{}:
			default:
			}
		}
	}
}

// apply enters announcements into the index. Those of generations that do not live here are no
// use, and those in another format are from another version of this program. This Store's own come
// back as well, when the index may have forgotten the blob already.
func (s *Store) apply(data []byte) {
	sender, records, ok := decodeNews(data)
	if !ok || sender == s.news.sender {
		return
	}
	for _, r := range records {
		switch {
		case s.generation(r.entry.generation()) == nil:
		case r.entry.size() == 0:
			s.index.forget(r.key, r.entry.generation())
		default:
			s.index.set(r.key, r.entry)
		}
	}
}

// repair lists the current generation after every gap, again and again until that succeeds.
func (s *Store) repair(ctx context.Context, gap <-chan struct{}) error {
	for {
		select {
		case <-gap:
		case <-ctx.Done():
			return ended(ctx)
		}
		for delay := repairDelay; ; delay = min(2*delay, repairDelayMax) {
			err := s.list(ctx, s.current())
			if err == nil {
				s.metrics.repairs.Inc()
				break
			}
			if ctx.Err() != nil {
				return err
			}
			s.cfg.Log.WarnContext(ctx, "the index cannot be repaired yet", "err", err)
			if err := pause(ctx, delay/2+rand.N(delay/2)); err != nil { //nolint:gosec // spreads retries
				return err
			}
		}
	}
}
