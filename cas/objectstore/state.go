package objectstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
)

// SubjectGenerations is the core NATS subject on which the rotator publishes the state of the
// generations when it changes, and on which any process asks for room: the one is JSON with a field
// "state", the other with a field "want", a number of bytes.
const SubjectGenerations = "jetfarm.cas.gen"

const (
	// stateStream holds one message, the state. It is in memory, so that it can be written while the
	// broker's disk is full; who finds none after a restart begins with the streams that there are.
	stateStream  = "CAS_STATE"
	stateSubject = "jetfarm.cas.state"

	// viewAge bounds how old the state is that a promise is made by, counted from before it was asked
	// for, and viewGrace is how long the rotator waits between the announcement that a generation is
	// old and its drop. The difference is left for the answer to be sent.
	viewAge   = 150 * time.Millisecond
	viewGrace = 450 * time.Millisecond
)

// state is what all processes agree on about the generations. The rotator alone writes it, each time
// expecting the sequence that it read, so that who was overtaken changes nothing. The numbers only
// grow within an epoch: a generation is fresh, then aging, then old, then dropped.
type state struct {
	// Epoch changes when the state was lost and made anew.
	Epoch string `json:"epoch"`
	// Holder is the rotator, "" when it has left.
	Holder string `json:"holder"`
	// Current is the newest generation, which is written to.
	Current uint32 `json:"current"`
	// Aging is up to which generation blobs that are used are copied forward in the background.
	Aging uint32 `json:"aging"`
	// Old is up to which generation no blob is reported present before it was copied forward.
	Old uint32 `json:"old"`
	// Dropped is up to which generation the streams are deleted, or will be. Only what it covers may
	// be deleted, so a rotator that wakes up late can only delete what is to be deleted anyway.
	Dropped uint32 `json:"dropped"`
	// Limit is the most bytes of all streams, 0 for none, and Used what they had at the last look.
	Limit int64 `json:"limit"`
	Used  int64 `json:"used"`
	// Full says why nothing can be stored, else "".
	Full string `json:"full,omitempty"`
}

// view is the state as this process knows it.
type view struct {
	state
	sequence uint64
	asked    time.Time // when it was asked for; zero for one that was announced
}

// announcement is a message on SubjectGenerations.
type announcement struct {
	State    *state `json:"state,omitempty"`
	Sequence uint64 `json:"sequence,omitempty"`
	Want     int64  `json:"want,omitempty"`
}

// known is the last state that this process has seen.
func (s *Store) known() *view { return s.viewed.Load() }

// look returns a state that is at most viewAge old. Whoever promises that a blob stays needs one.
func (s *Store) look(ctx context.Context) (*view, error) {
	if v := s.known(); time.Since(v.asked) < viewAge {
		return v, nil
	}
	return s.ask(ctx)
}

// ask reads the state from the broker's leader. That there is none is a state as well, the first one.
func (s *Store) ask(ctx context.Context) (*view, error) {
	v := &view{asked: time.Now()}
	m, err := s.small.lastFromLeader(ctx, stateStream, stateSubject)
	switch {
	case err == nil:
		v.sequence = m.sequence
		if err := json.Unmarshal(m.data, &v.state); err != nil {
			return nil, fmt.Errorf("%w: state of the generations: %w", cas.ErrUnavailable, err)
		}
	case !isStateless(err):
		return nil, err
	}
	return s.see(v), nil
}

// isStateless tells a broker that has no state from one that does not answer.
func isStateless(err error) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return errors.Is(err, cas.ErrNotFound) || (ok && api.ErrorCode == jetstream.JSErrCodeStreamNotFound)
}

// see makes a state known unless a newer one is, and returns the one that is known then.
func (s *Store) see(v *view) *view {
	for {
		old := s.viewed.Load()
		switch {
		case v.Epoch == old.Epoch && v.sequence < old.sequence, v.Epoch != old.Epoch && !v.asked.After(old.asked):
			return old
		case v.Epoch == old.Epoch && v.asked.Before(old.asked):
			v.asked = old.asked
		}
		if !s.viewed.CompareAndSwap(old, v) {
			continue
		}
		s.index.drop(v.Dropped)
		if v.Aging > old.Aging {
			s.renew()
		}
		if v.Current > s.current().number || v.Dropped != old.Dropped {
			wake(s.turn)
		}
		if v.Holder != s.name && (v.sequence != old.sequence || v.Epoch != old.Epoch) {
			s.ledger.told(v.state)
		}
		return v
	}
}

// hear applies an announcement. What another epoch says is only believed when it was asked for.
func (s *Store) hear(data []byte) {
	var a announcement
	if json.Unmarshal(data, &a) != nil {
		return
	}
	if a.Want > 0 {
		s.ledger.want(a.Want)
		wake(s.work)
	}
	if a.State != nil && a.State.Epoch == s.known().Epoch {
		s.see(&view{state: *a.State, sequence: a.Sequence})
	}
}

// tell announces something on SubjectGenerations. A loss delays the others until they ask.
func (s *Store) tell(ctx context.Context, a announcement) {
	data, err := json.Marshal(a)
	if err == nil {
		err = s.cfg.Small.Publish(SubjectGenerations, data)
	}
	if err != nil {
		s.cfg.Log.DebugContext(ctx, "an announcement is lost", "err", err)
	}
}

// write replaces the state that before is. errExists means that somebody else has.
func (s *Store) write(ctx context.Context, before *view, next state) (*view, error) {
	data, err := json.Marshal(next)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.RequestTimeout, errTimeout)
	defer cancel()
	asked := time.Now()
	sequence, err := s.replace(ctx, before.sequence, data)
	if err != nil {
		return nil, err
	}
	v := s.see(&view{state: next, sequence: sequence, asked: asked})
	if next.Current != before.Current || next.Aging != before.Aging || next.Old != before.Old || next.Dropped != before.Dropped || next.Full != before.Full {
		s.tell(ctx, announcement{State: &next, Sequence: sequence})
	}
	return v, nil
}

func (s *Store) replace(ctx context.Context, before uint64, data []byte) (uint64, error) {
	m, err := s.js.Publish(ctx, stateSubject, data, jetstream.WithExpectLastSequencePerSubject(before), jetstream.WithRetryAttempts(0))
	if err != nil {
		return 0, brokerError(ctx, err)
	}
	return m.Sequence, nil
}

// openState makes the stream of the state where there is none. In a cluster, requests about a stream that
// does not exist may get no answer.
func (s *Store) openState(ctx context.Context) error {
	_, err := s.js.CreateStream(ctx, jetstream.StreamConfig{
		Name:              stateStream,
		Description:       "state of the generations of the content addressable storage",
		Subjects:          []string{stateSubject},
		Storage:           jetstream.MemoryStorage,
		MaxMsgsPerSubject: 1,
		Replicas:          s.cfg.Replicas,
		AllowDirect:       true,
		Duplicates:        100 * time.Millisecond,
	})
	if err != nil && !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
		return fmt.Errorf("make stream %s: %w", stateStream, brokerError(ctx, err))
	}
	return nil
}

// newName is a name for a process or an epoch.
func newName(n uint64) string { return strconv.FormatUint(n, 36) }

// wake makes the reader of a channel with room for one look.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
