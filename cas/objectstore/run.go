package objectstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
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
	// suspectDelay is how often requests that find no stream may cause a listing.
	suspectDelay = 10 * time.Second
)

// Run tells other processes what this one stores, and keeps the index current with what they tell.
// It lists the live generations when it starts and after every time that announcements may have been
// lost or the broker may have lost blobs. It returns nil after ctx has ended.
func (s *Store) Run(ctx context.Context) error {
	arriving := make(chan *nats.Msg, newsChannel)
	sub, err := s.cfg.Small.ChanSubscribe(SubjectIndex, arriving)
	if err != nil {
		return fmt.Errorf("objectstore: %w", brokerError(ctx, err))
	}
	subs := []*nats.Subscription{sub}
	for _, subject := range s.subjects() {
		more, err := s.cfg.Small.ChanSubscribe(subject, arriving)
		if err != nil {
			return errors.Join(fmt.Errorf("objectstore: %w", brokerError(ctx, err)), s.unsubscribe(subs))
		}
		subs = append(subs, more)
	}
	slow := sub.StatusChanged(nats.SubscriptionSlowConsumer)
	connected := s.cfg.Small.StatusChanged(nats.CONNECTED)
	defer s.cfg.Small.RemoveStatusListener(connected)

	s.doubt() // what was stored since Open listed it
	group, bound := errgroup.WithContext(ctx)
	group.Go(func() error { return s.announce(bound) })
	group.Go(func() error { return s.listen(bound, arriving, slow, connected) })
	group.Go(func() error { return s.repair(bound) })
	group.Go(func() error { return s.carry(bound) })
	if s.cfg.Maintain {
		group.Go(func() error { return s.tend(bound) })
		group.Go(func() error { return s.clean(bound) })
	}
	err = group.Wait()
	if e := s.unsubscribe(subs); e != nil {
		s.cfg.Log.WarnContext(ctx, "unsubscribe from announcements", "err", e)
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// subjects are what Run listens to beside SubjectIndex.
func (s *Store) subjects() []string {
	if !s.cfg.Maintain {
		return []string{SubjectGenerations}
	}
	return []string{SubjectGenerations, SubjectDisk, SubjectCollect}
}

func (s *Store) unsubscribe(subs []*nats.Subscription) error {
	var errs []error
	for _, sub := range subs {
		if err := sub.Unsubscribe(); err != nil && !s.cfg.Small.IsClosed() {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
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
func (s *Store) listen(ctx context.Context, arriving <-chan *nats.Msg, slow <-chan nats.SubStatus, connected <-chan nats.Status) error {
	for {
		lost := true
		select {
		case m := <-arriving:
			s.receive(ctx, m)
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
			s.doubt()
		}
	}
}

// receive applies one message.
func (s *Store) receive(ctx context.Context, m *nats.Msg) {
	switch m.Subject {
	case SubjectIndex:
		s.apply(m.Data)
	case SubjectGenerations:
		s.hear(m.Data)
	case SubjectDisk:
		s.disks.hear(m.Data, s.ledger.stored(), time.Now())
	case SubjectCollect:
		if s.known().Holder == s.name && m.Reply != "" {
			s.collected(ctx, m)
		}
	}
}

// doubt makes Run list the streams.
func (s *Store) doubt() { wake(s.gap) }

// suspect is doubt after a request that found no stream, which someone may have deleted. The broker
// says the same while it has no leader, so this is not done often.
func (s *Store) suspect(err error) {
	if !errors.Is(err, nats.ErrNoResponders) && !errors.Is(err, jetstream.ErrNoStreamResponse) && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return
	}
	now, last := time.Now().UnixNano(), s.suspected.Load()
	if now-last >= int64(suspectDelay) && s.suspected.CompareAndSwap(last, now) {
		s.doubt()
	}
}

// apply enters announcements into the index. Blobs of generations that do not live here are no use,
// no blob has a size with the mark, and other formats are from another version of this program. This
// Store's own come back as well, when the index may have forgotten the blob already.
func (s *Store) apply(data []byte) {
	sender, records, ok := decodeNews(data)
	if !ok || sender == s.news.sender {
		return
	}
	for _, r := range records {
		switch {
		case r.entry.size() == 0:
			s.index.forget(r.key, r.entry.generation())
		case r.entry&mark != 0 || s.generation(r.entry.generation()) == nil:
		default:
			s.index.set(r.key, r.entry)
		}
	}
}

// repair brings generations and index to what the broker has after every gap, and the list of the
// generations after every change of it, again and again until that succeeds.
func (s *Store) repair(ctx context.Context) error {
	for {
		mend, done := s.adopt, func() {}
		select {
		case <-s.gap:
			mend, done = s.refresh, s.metrics.repairs.Inc
		case <-s.turn:
		case <-ctx.Done():
			return ended(ctx)
		}
		for delay := repairDelay; ; delay = min(2*delay, repairDelayMax) {
			err := mend(ctx)
			if err == nil {
				done()
				break
			}
			if ctx.Err() != nil {
				return err
			}
			s.cfg.Log.WarnContext(ctx, "the index cannot be repaired yet", "err", err)
			if err := s.pauseRepair(ctx, delay/2+rand.N(delay/2)); err != nil { //nolint:gosec // spreads retries
				return err
			}
			mend, done = s.refresh, s.metrics.repairs.Inc
		}
	}
}

// pauseRepair is pause, which the next gap ends: the broker may be back.
func (s *Store) pauseRepair(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-s.gap:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	}
}

// refresh finds the live generations, makes streams of the current one that are gone, and lists all.
// What was in the index before and is not listed is forgotten. The newest generation is first, so that
// what it lost is found in an older one.
func (s *Store) refresh(ctx context.Context) error {
	v, err := s.ask(ctx)
	if err != nil {
		return err
	}
	live, err := openGenerations(ctx, s.js, s.cfg, s.generations(), v.Dropped)
	if err != nil {
		return brokerError(ctx, err)
	}
	s.live.Store(&live)
	s.index.begin(live)
	// A broker that has lost everything begins again with the first number.
	s.index.dropped.Store(v.Dropped)
	s.index.drop(s.known().Dropped)
	for _, g := range live {
		if err := s.list(ctx, g); err != nil {
			return err
		}
		if dropped := s.index.sweep(g.number); dropped > 0 {
			s.cfg.Log.WarnContext(ctx, "the broker has lost blobs", "blobs", dropped, "generation", g.number)
		}
	}
	return nil
}

// adopt takes over the list of the live generations. Of those that were not known, the blobs are listed:
// their announcements may have come too early.
func (s *Store) adopt(ctx context.Context) error {
	v, err := s.ask(ctx)
	if err != nil {
		return err
	}
	before := s.generations()
	live, err := openGenerations(ctx, s.js, s.cfg, before, v.Dropped)
	if err != nil {
		return brokerError(ctx, err)
	}
	s.live.Store(&live)
	s.index.prune()
	for _, g := range live {
		if slices.ContainsFunc(before, func(b *generation) bool { return b.number == g.number }) {
			continue
		}
		if err := s.list(ctx, g); err != nil {
			return err
		}
	}
	return nil
}
