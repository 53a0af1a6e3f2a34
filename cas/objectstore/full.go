package objectstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/jetfarm/jetfarm/cas"
)

// refusal of the broker to store something.
type refusals struct {
	mu   sync.Mutex
	last string    // guarded by mu
	at   time.Time // guarded by mu
}

// refuse records that the broker has no room, so that the rotator makes some.
func (s *Store) refuse(err error) {
	if !errors.Is(err, cas.ErrFull) || !errors.Is(err, errNoRoom) {
		return
	}
	r := &s.refusals
	r.mu.Lock()
	r.last, r.at = err.Error(), time.Now()
	r.mu.Unlock()
	wake(s.work)
}

// refused is the last refusal if it still counts, else "".
func (s *Store) refused(now time.Time) string {
	r := &s.refusals
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.at) > fullBound {
		return ""
	}
	return r.last
}

// relent forgets the last refusal, since something was done about it.
func (s *Store) relent() {
	r := &s.refusals
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = ""
}

// Full is nil while blobs can be stored. Otherwise the error wraps cas.ErrFull and says what helps. It
// asks nobody: Run of a Store that maintains keeps it current.
func (s *Store) Full() error {
	if full := s.known().Full; full != "" {
		return fmt.Errorf("%w: %s", cas.ErrFull, full)
	}
	return nil
}

// Usage is what the store holds.
type Usage struct {
	// Bytes of all streams, of which the broker's disk has as many times more as there are replicas.
	Bytes int64
	// Limit is the most bytes, 0 when there is none.
	Limit int64
	Blobs int64
	// Full says why nothing can be stored, else "".
	Full string
	// Generations are the live ones, oldest first.
	Generations []Generation
}

// Generation is what was stored in the same stretch of time.
type Generation struct {
	Number  uint32
	Bytes   int64
	Blobs   int64
	Created time.Time
	// Aging says that what is used of it is copied forward, Old that nothing of it is reported present
	// before it was copied.
	Aging, Old bool
}

// Usage measures the streams.
func (s *Store) Usage(ctx context.Context) (Usage, error) {
	v, err := s.ask(ctx)
	if err != nil {
		return Usage{}, fmt.Errorf("objectstore: %w", err)
	}
	all, err := s.measure(ctx)
	if err != nil {
		return Usage{}, fmt.Errorf("objectstore: %w", err)
	}
	u := Usage{Limit: v.Limit, Full: v.Full}
	for _, e := range all {
		u.Bytes += e.bytes
		if e.number <= v.Dropped {
			continue
		}
		u.Blobs += e.blobs
		u.Generations = append(u.Generations, Generation{
			Number: e.number, Bytes: e.bytes, Blobs: e.blobs, Created: e.created, Aging: e.number <= v.Aging, Old: e.number <= v.Old,
		})
	}
	return u, nil
}

// SubjectCollect is the core NATS subject of requests to rotate now and to drop what is old. The
// rotator answers with an empty message, or with the text of an error.
const SubjectCollect = "jetfarm.cas.collect"

// Collect makes the rotator, in whatever process it is, begin a new generation and drop those that are
// old, as it would do by itself when room is needed. It returns when that is done.
func (s *Store) Collect(ctx context.Context) error {
	m, err := s.small.ask(ctx, SubjectCollect, nil)
	if err != nil {
		return fmt.Errorf("objectstore: no process rotates the generations: %w", err)
	}
	if len(m.Data) > 0 {
		return fmt.Errorf("objectstore: %w: %s", cas.ErrUnavailable, m.Data)
	}
	return nil
}

// collected hands a request to the rotator, unless it has one.
func (s *Store) collected(ctx context.Context, m *nats.Msg) {
	select {
	case s.collects <- m:
	default:
		s.answer(ctx, m, errors.New("another request is being served"))
	}
}

func (s *Store) answer(ctx context.Context, m *nats.Msg, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if err := m.Respond([]byte(text)); err != nil {
		s.cfg.Log.DebugContext(ctx, "a request to collect is not answered", "err", err)
	}
}
