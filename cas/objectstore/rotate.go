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

	"github.com/jetfarm/jetfarm/cas"
)

const (
	// slicing is into how many generations the limit is cut, which is how much is dropped at once and
	// how much is kept free for what arrives meanwhile.
	slicing = 10
	// maxCount bounds the blobs of a generation, and with them the time in which a broker that was
	// killed reads its stream again.
	maxCount = 400_000

	// rotateEvery is how often the streams are measured at least.
	rotateEvery = 250 * time.Millisecond
	// leaseBound is after which time without a sign of the rotator another one takes its place.
	leaseBound = 3 * time.Second
	// fullBound is for how long a refusal of the broker counts.
	fullBound = 5 * time.Second

	// A generation is aging when these percent of the limit are newer than it, and old at those.
	agingPercent = 35
	oldPercent   = 50
)

// rotator makes the next generation when the current one is full, and drops the oldest ones so that
// there is always room for one more. Of all processes that take part one does so, the holder. It
// belongs to one goroutine.
//
// Whatever it does was first written to the state, expecting the state that the decision was made by.
// So a rotator that was overtaken while it slept finds that its decision is not written, and if it
// fell asleep after that, what is left to do is what anybody may do at any time: make the streams of
// the current generation, and delete those of dropped ones, whose numbers are never used again. The
// rejected alternative is a lease in time, which a stalled process does not notice to have lost.
type rotator struct {
	store *Store

	sequence uint64    // of the state that was seen last
	epoch    string    // of the same
	since    time.Time // when it was first seen

	marked    map[uint32]time.Time // when each old generation became old for all, as far as this one knows
	learned   int64                // the limit that a refusal of the broker has shown, 0 for none
	learnedAt time.Time            // when it did
	pressed   bool                 // there was no room because of the retention
	low       bool                 // the disk was below its low water and is not above its high water yet
}

// extent is what the streams of one generation hold.
type extent struct {
	number  uint32
	bytes   int64
	blobs   int64
	created time.Time // when the first of its streams was made
	streams []string
}

// tend rotates until ctx ends, whenever it is this process's turn.
func (s *Store) tend(ctx context.Context) error {
	r := rotator{store: s, marked: make(map[uint32]time.Time)}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var asked *nats.Msg
		select {
		case <-timer.C:
		case <-s.work:
		case asked = <-s.collects:
		case <-ctx.Done():
			r.leave(ctx)
			return ended(ctx)
		}
		again, err := r.turn(ctx, asked != nil)
		if asked != nil {
			s.answer(ctx, asked, err)
		}
		if err != nil && ctx.Err() == nil && !errors.Is(err, errExists) && !errors.Is(err, errNotHolder) {
			s.cfg.Log.DebugContext(ctx, "the generations cannot be kept now", "err", err)
		}
		delay := rotateEvery
		if again && err == nil {
			delay = 0
		}
		timer.Reset(delay)
	}
}

// errNotHolder ends a request that another process has to serve.
var errNotHolder = fmt.Errorf("%w: another process rotates", cas.ErrUnavailable)

// turn looks at the streams once and does what is due. It asks for another turn when it has made room.
func (r *rotator) turn(ctx context.Context, collect bool) (again bool, err error) {
	s := r.store
	v, err := s.ask(ctx)
	if err != nil {
		return false, err
	}
	if v, err = r.hold(ctx, v); err != nil {
		return false, err
	}
	before := s.ledger.begin()
	live, dead, err := r.measure(ctx, v.Dropped)
	if err != nil {
		return false, err
	}
	if len(live) == 0 {
		s.doubt() // somebody has deleted all there was
		return false, nil
	}
	next := r.plan(v.state, live, before, collect)
	if next.Current > live[len(live)-1].number {
		if err := s.make(ctx, next.Current); err != nil {
			if !errors.Is(err, cas.ErrFull) {
				return false, err
			}
			next.Current = live[len(live)-1].number // once there is room
		}
	}
	after, err := s.write(ctx, v, next)
	if err != nil {
		return false, err
	}
	s.ledger.measured(before, next.Used, next.Limit, next.Full)
	if after.Dropped > v.Dropped {
		s.relent()
	}
	r.count(v.state, after.state, live)
	for g := v.Old + 1; g <= after.Old; g++ {
		r.marked[g] = time.Now()
	}
	for _, e := range live {
		if e.number <= after.Dropped {
			dead = append(dead, e)
			delete(r.marked, e.number)
		}
	}
	return len(dead) > 0, r.delete(ctx, dead)
}

// hold returns the state once this process is its holder, which it becomes when there is none or the
// one there is gives no sign.
func (r *rotator) hold(ctx context.Context, v *view) (*view, error) {
	s := r.store
	if v.Holder == s.name {
		return v, nil
	}
	if v.sequence != r.sequence || v.Epoch != r.epoch || r.since.IsZero() {
		r.sequence, r.epoch, r.since = v.sequence, v.Epoch, time.Now()
	}
	if v.sequence != 0 && v.Holder != "" && time.Since(r.since) < leaseBound {
		return nil, errNotHolder
	}
	next := v.state
	next.Holder = s.name
	if v.sequence == 0 {
		if err := s.openState(ctx); err != nil {
			return nil, err
		}
		next = state{Epoch: newName(rand.Uint64()), Holder: s.name} //nolint:gosec // a name, not a secret
		v = &view{}
	}
	held, err := s.write(ctx, v, next)
	if err != nil {
		return nil, err
	}
	clear(r.marked)
	for g := held.Dropped + 1; g <= held.Old; g++ {
		r.marked[g] = time.Now()
	}
	return held, nil
}

// leave lets another process take over at once.
func (r *rotator) leave(ctx context.Context) {
	s := r.store
	v := s.known()
	if v.Holder != s.name {
		return
	}
	ctx, cancel := detached(ctx, s.cfg.RequestTimeout)
	defer cancel()
	next := v.state
	next.Holder = ""
	if _, err := s.write(ctx, v, next); err != nil {
		s.cfg.Log.DebugContext(ctx, "the rotation is not handed over", "err", err)
	}
}

// measure asks for the size of all streams: those of live generations, oldest first, and those of
// dropped ones.
func (r *rotator) measure(ctx context.Context, dropped uint32) (live, dead []extent, err error) {
	all, err := r.store.measure(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range all {
		if e.number <= dropped {
			dead = append(dead, e)
		} else {
			live = append(live, e)
		}
	}
	return live, dead, nil
}

// measure returns what all generations hold, oldest first, one whose streams are to be deleted
// included.
func (s *Store) measure(ctx context.Context) ([]extent, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.RequestTimeout, errTimeout)
	defer cancel()
	byNumber := make(map[uint32]*extent)
	infos := s.js.ListStreams(ctx, jetstream.WithStreamListSubject("$O.>"))
	for info := range infos.Info() {
		_, number, _, ok := parseStream(info.Config.Name)
		if !ok {
			continue
		}
		e := byNumber[number]
		if e == nil {
			e = &extent{number: number, created: info.Created}
			byNumber[number] = e
		}
		if info.Created.Before(e.created) {
			e.created = info.Created
		}
		e.bytes += int64(info.State.Bytes)           //nolint:gosec // less than there is disk
		e.blobs += int64(info.State.NumSubjects / 2) //nolint:gosec // a blob has two
		e.streams = append(e.streams, info.Config.Name)
	}
	if err := infos.Err(); err != nil && !errors.Is(err, jetstream.ErrEndOfData) {
		return nil, fmt.Errorf("measure the streams: %w", brokerError(ctx, err))
	}
	all := make([]extent, 0, len(byNumber))
	for _, e := range byNumber {
		all = append(all, *e)
	}
	slices.SortFunc(all, func(a, b extent) int { return int(a.number) - int(b.number) })
	return all, nil
}

// make makes the streams of a generation with the shards of the current one.
func (s *Store) make(ctx context.Context, number uint32) error {
	current := s.current()
	for _, f := range []family{small, large} {
		for shard := range max(1, len(current.small), len(current.large)) {
			b := newBucket(f, number, shard, s.cfg.WriteBudget)
			if err := b.create(ctx, s.js, s.cfg.Replicas, s.cfg.MaxBytes); err != nil {
				return fmt.Errorf("make stream %s: %w", b.stream, brokerError(ctx, err))
			}
		}
	}
	return nil
}

// delete deletes the streams of dropped generations.
func (r *rotator) delete(ctx context.Context, dead []extent) error {
	var errs []error
	for _, e := range dead {
		for _, stream := range e.streams {
			bound, cancel := context.WithTimeoutCause(ctx, r.store.cfg.RequestTimeout, errTimeout)
			err := r.store.js.DeleteStream(bound, stream)
			cancel()
			if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
				errs = append(errs, fmt.Errorf("delete stream %s: %w", stream, brokerError(ctx, err)))
			}
		}
	}
	return errors.Join(errs...)
}

// count enters into the metrics what was decided.
func (r *rotator) count(before, after state, live []extent) {
	m := r.store.metrics
	if before.Current != 0 && after.Current > before.Current {
		m.rotations.Inc()
	}
	for i, e := range live {
		if e.number > before.Dropped && e.number <= after.Dropped {
			m.evictedBlobs.Add(float64(e.blobs))
			m.evictedBytes.Add(float64(e.bytes))
			if i+1 < len(live) {
				m.evictedAge.Set(time.Since(live[i+1].created).Seconds())
			}
		}
	}
}
