package objectstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Store is a cas.Store in JetStream.
type Store struct {
	cfg     Config
	metrics *metrics
	index   *index
	live    atomic.Pointer[[]*generation] // what generations returns
	news    news
	losses  losses
	buffers buffers
	busy    chan struct{} // see encoder

	name     string // names this Store as the rotator
	viewed   atomic.Pointer[view]
	ledger   *ledger
	forward  *forward
	readers  *readers
	disks    disks
	refusals refusals
	collects chan *nats.Msg

	gap       chan struct{} // has room for one, as have the others; wakes the repair in Run
	turn      chan struct{} // wakes it when generations come or go
	work      chan struct{} // wakes the rotator
	suspected atomic.Int64  // when suspect last woke it, in nanoseconds

	js                      jetstream.JetStream
	small, bulk             api
	smallWrites, bulkWrites *publisher
}

var _ cas.Store = (*Store)(nil)

// Open makes the streams that are missing and builds the index. Errors of the broker wrap
// cas.ErrUnavailable. The Store works without Run, but knows of what other processes store only by
// asking for it.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg:    cfg,
		index:  newIndex(),
		busy:   newBusy(),
		gap:    make(chan struct{}, 1),
		turn:   make(chan struct{}, 1),
		work:   make(chan struct{}, 1),
		news:   news{sender: rand.Uint64(), wake: make(chan struct{}, 1)}, //nolint:gosec // a name, not a secret
		ledger: newLedger(), forward: newForward(), readers: newReaders(), collects: make(chan *nats.Msg, 1),
		small: api{conn: cfg.Small, timeout: cfg.RequestTimeout},
		bulk:  api{conn: cfg.Bulk, timeout: cfg.RequestTimeout},
	}
	s.name = newName(s.news.sender)
	if s.js, err = jetstream.New(cfg.Small); err != nil {
		return nil, fmt.Errorf("objectstore: %w", err)
	}
	if s.smallWrites, err = newPublisher(cfg.Small); err != nil {
		return nil, fmt.Errorf("objectstore: %w", err)
	}
	if s.bulkWrites, err = newPublisher(cfg.Bulk); err != nil {
		return nil, fmt.Errorf("objectstore: %w", err)
	}
	s.viewed.Store(&view{})
	s.live.Store(&[]*generation{{}})
	if err := s.openState(ctx); err != nil {
		return nil, fmt.Errorf("objectstore: %w", err)
	}
	v, err := s.ask(ctx)
	if err != nil {
		return nil, fmt.Errorf("objectstore: %w", err)
	}
	live, err := openGenerations(ctx, s.js, cfg, nil, v.Dropped)
	if err != nil {
		return nil, fmt.Errorf("objectstore: %w", brokerError(ctx, err))
	}
	s.live.Store(&live)
	for _, g := range live {
		if err := s.list(ctx, g); err != nil {
			return nil, fmt.Errorf("objectstore: %w", err)
		}
	}
	if s.metrics, err = newMetrics(cfg.Registerer, s); err != nil {
		return nil, fmt.Errorf("objectstore: %w", err)
	}
	return s, nil
}

// generations returns those that live, newest first and never none. Nobody changes them.
func (s *Store) generations() []*generation { return *s.live.Load() }

// current is the generation that is written to.
func (s *Store) current() *generation { return s.generations()[0] }

// generation returns the live generation of this number, or nil.
func (s *Store) generation(number uint32) *generation {
	for _, g := range s.generations() {
		if g.number == number {
			return g
		}
	}
	return nil
}

// Open returns the bytes of a blob from offset on, see cas.Store. A blob of at most 512 KiB is
// verified as a whole before the first byte, whatever the offset. A blob that the index does not
// know is looked for in every live generation; when it is in none, all processes forget it.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	return s.openCounted(ctx, d, span{offset: offset})
}

// span is what of a blob is read: its bytes from an offset on, or frames of them.
type span struct {
	offset int64
	frames bool
}

// openCounted is the end of Open and OpenFrames.
func (s *Store) openCounted(ctx context.Context, d digest.Digest, from span) (io.ReadCloser, error) {
	r, err := s.open(ctx, d, from)
	s.metrics.gets.WithLabelValues(result(err)).Inc()
	if err != nil {
		s.suspect(err)
		return nil, fmt.Errorf("read blob %v: %w", d, err)
	}
	return r, nil
}

func (s *Store) open(ctx context.Context, d digest.Digest, from span) (io.ReadCloser, error) {
	switch {
	case ctx.Err() != nil:
		return nil, ended(ctx)
	case from.offset < 0 || from.offset > d.Size():
		return nil, fmt.Errorf("offset %d is outside of it", from.offset)
	case d.IsEmpty() && from.frames:
		return &memoryReader{*bytes.NewReader(compress.Append(nil, nil))}, nil
	case d.IsEmpty():
		return &memoryReader{*bytes.NewReader(nil)}, nil
	case d.IsImpossible():
		return nil, cas.ErrNotFound
	}
	k, live := keyOf(d), s.generations()
	e, known := s.index.get(k, d.Size())
	if known {
		if g := s.generation(e.generation()); g != nil {
			r, err := s.openAlive(ctx, g, d, from, true)
			if !errors.Is(err, cas.ErrNotFound) {
				s.touched(k, d)
				return r, err
			}
		}
		s.forget(k, e.generation())
	}
	for _, g := range live {
		if known && g.number == e.generation() {
			continue
		}
		r, err := s.openAlive(ctx, g, d, from, false)
		if !errors.Is(err, cas.ErrNotFound) {
			s.touched(k, d)
			return r, err
		}
	}
	// Another index may know a blob that this one does not, and promise it to those who could store it
	// again. That this one knows another size of it speaks for a wrong digest and against a loss.
	newest := live[0].number
	wrongSize := !known && e != 0
	if !wrongSize && e.generation() < newest && s.losses.due(k, time.Now()) {
		s.forget(k, newest)
	}
	return nil, cas.ErrNotFound
}

// openAlive is openIn, for which a generation that was dropped meanwhile has nothing.
func (s *Store) openAlive(ctx context.Context, g *generation, d digest.Digest, from span, known bool) (io.ReadCloser, error) {
	if g.number <= s.known().Dropped {
		return nil, cas.ErrNotFound
	}
	r, err := s.openIn(ctx, g, d, from, known)
	if errors.Is(err, cas.ErrUnavailable) && ctx.Err() == nil {
		if v, e := s.ask(ctx); e == nil && g.number <= v.Dropped {
			return nil, cas.ErrNotFound
		}
	}
	return r, err
}

func (s *Store) openIn(ctx context.Context, g *generation, d digest.Digest, from span, known bool) (io.ReadCloser, error) {
	b := g.bucket(d)
	if b == nil {
		return nil, cas.ErrNotFound
	}
	if b.family == large {
		return s.openLarge(ctx, b, d, from, known)
	}
	return s.openSmall(ctx, b, d, from, known)
}

// doubts tells whether to ask the leader when a direct get finds nothing: a replica may lag behind
// the write, of which the index may know.
func (s *Store) doubts(known bool) bool { return known || s.cfg.Replicas > 1 }

// Put stores a blob, see cas.Store. A blob that the index knows is not read.
func (s *Store) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return s.counted(d, s.put(ctx, d, noUpload, r))
}

// counted is the error of a put as its caller gets it.
func (s *Store) counted(d digest.Digest, err error) error {
	s.metrics.puts.WithLabelValues(result(err)).Inc()
	var fault *sourceError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &fault):
		return fault.err
	}
	s.suspect(err)
	return fmt.Errorf("store blob %v: %w", d, err)
}

func (s *Store) put(ctx context.Context, d digest.Digest, token string, r io.Reader) error {
	switch {
	case ctx.Err() != nil:
		return ended(ctx)
	case d.IsEmpty():
		return nil
	case d.IsImpossible():
		return fmt.Errorf("%w: no content has it", cas.ErrMismatch)
	case d.Size() > maxSize:
		return fmt.Errorf("%w: blobs of more than %d bytes cannot be stored", cas.ErrFull, int64(maxSize))
	}
	if s.stays(ctx, d) {
		return nil
	}
	err := s.putNew(ctx, d, token, r)
	if err != nil {
		s.refuse(err)
		return err
	}
	return s.settle(ctx, d)
}

func (s *Store) putNew(ctx context.Context, d digest.Digest, token string, r io.Reader) error {
	if familyOf(d) == large {
		return s.putLarge(ctx, d, token, r)
	}
	return s.putSmall(ctx, d, r)
}

// stays tells a blob that is stored where it need not be stored again.
func (s *Store) stays(ctx context.Context, d digest.Digest) bool {
	k := keyOf(d)
	e, known := s.index.get(k, d.Size())
	if !known {
		return false
	}
	v, err := s.look(ctx)
	if err != nil || e.generation() <= v.Old {
		return false
	}
	s.touched(k, d)
	return true
}

// settle sees to it that a blob that was just stored stays: an upload that took long may have ended in
// an old generation.
func (s *Store) settle(ctx context.Context, d digest.Digest) error {
	k := keyOf(d)
	for range settleRounds {
		v, err := s.look(ctx)
		if err != nil {
			return err
		}
		if e, known := s.index.get(k, d.Size()); !known || e.generation() > v.Old {
			return nil
		}
		if err := s.keep(ctx, d, v.Old); err != nil {
			return fmt.Errorf("%w: %w", cas.ErrUnavailable, err)
		}
	}
	return fmt.Errorf("%w: the blob gets old faster than it is stored", cas.ErrUnavailable)
}

// settleRounds is how often what was stored or copied may have become old again meanwhile.
const settleRounds = 3

// stored makes a blob known that this process has just stored or found.
func (s *Store) stored(b *bucket, d digest.Digest) {
	k, e := keyOf(d), newEntry(b, d.Size())
	s.index.set(k, e)
	s.metrics.writtenBytes.Add(float64(d.Size()))
	if !s.news.add(record{k, e}) {
		s.metrics.lostAnnouncements.Inc()
	}
}

// discard removes the message that makes a damaged blob visible, so that it can be stored again,
// and makes everybody forget the blob.
func (s *Store) discard(ctx context.Context, b *bucket, d digest.Digest, sequence uint64) {
	cleaning, cancel := detached(ctx, s.cfg.RequestTimeout)
	defer cancel()
	err := s.small.delete(cleaning, b.stream, sequence)
	s.cfg.Log.ErrorContext(ctx, "a stored blob is damaged and was dropped", "blob", d.String(), "stream", b.stream, "sequence", sequence, "err", err)
	s.forget(keyOf(d), b.generation)
}

// forget makes everybody forget a blob that is in no generation up to this one. Where that is wrong,
// the blob is uploaded once more.
func (s *Store) forget(k key, generation uint32) {
	s.index.forget(k, generation)
	if !s.news.add(record{k, lostEntry(generation)}) {
		s.metrics.lostAnnouncements.Inc()
	}
}

// Missing returns the digests that the index does not know, see cas.Store. A blob that another
// process stored within the last milliseconds may be among them. What an old generation has is copied
// into the current one first, and is among them where that cannot be done in time.
func (s *Store) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("look for %d blobs: %w", len(ds), ended(ctx))
	}
	bounded, cancel := context.WithTimeoutCause(ctx, forwardBound, errTimeout)
	defer cancel()
	for round := 0; ; round++ {
		v, err := s.look(ctx)
		if err != nil {
			return nil, fmt.Errorf("look for %d blobs: %w", len(ds), err)
		}
		missing, old := s.sift(ds, v.state, round == settleRounds || bounded.Err() != nil)
		if len(old) == 0 {
			return missing, nil
		}
		s.keepAll(bounded, old, v.Old)
		if ctx.Err() != nil {
			return nil, fmt.Errorf("look for %d blobs: %w", len(ds), ended(ctx))
		}
	}
}

// present tells whether the index knows a blob that stays, as Missing does.
func (s *Store) present(ctx context.Context, d digest.Digest) (bool, error) {
	if d.IsEmpty() {
		return true, nil
	}
	if _, known := s.index.get(keyOf(d), d.Size()); !known {
		return false, nil
	}
	missing, err := s.Missing(ctx, []digest.Digest{d})
	return len(missing) == 0, err
}

// sift returns what the index does not know, and what it knows in an old generation: as missing, too,
// if this is the last look.
func (s *Store) sift(ds []digest.Digest, now state, last bool) (missing, old []digest.Digest) {
	type name struct {
		key  key
		size int64
	}
	var seen map[name]struct{}
	keys, entries := s.entries(ds)
	for i, d := range ds {
		if d.IsEmpty() {
			continue
		}
		k, e := keys[i], entries[i]
		ok := e != 0 && e.size() == d.Size()
		if ok && e.generation() > now.Old {
			if e.generation() <= now.Aging {
				s.forward.later(k, d)
			}
			continue
		}
		n := name{k, d.Size()}
		if _, again := seen[n]; again {
			continue
		}
		if seen == nil {
			seen = make(map[name]struct{})
		}
		seen[n] = struct{}{}
		if ok && e.generation() > now.Dropped && !last {
			old = append(old, d)
		} else {
			missing = append(missing, d)
		}
	}
	return missing, old
}

// entries returns the keys of digests and what the index has for them.
func (s *Store) entries(ds []digest.Digest) ([]key, []entry) {
	keys, entries := make([]key, len(ds)), make([]entry, len(ds))
	var keyer keyer
	for i, d := range ds {
		keys[i] = keyer.Of(d)
	}
	if len(ds) < indexShards {
		for i, d := range ds {
			entries[i], _ = s.index.get(keys[i], d.Size())
		}
		return keys, entries
	}
	s.index.getAll(keys, entries)
	return keys, entries
}

// confirmWidth is how many streams Confirm asks at the same time.
const confirmWidth = 16

// Confirm is Missing with certainty: what the index does not know is looked for in the streams. It
// costs the broker no read of blob data.
func (s *Store) Confirm(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	doubtful, err := s.Missing(ctx, ds)
	if err != nil || len(doubtful) == 0 {
		return nil, err
	}
	group, bound := errgroup.WithContext(ctx)
	group.SetLimit(confirmWidth)
	for _, d := range doubtful {
		if d.IsImpossible() {
			continue
		}
		group.Go(func() error {
			_, err := s.find(bound, d)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, fmt.Errorf("look for %d blobs: %w", len(ds), err)
	}
	// What was found may be old, and is then copied.
	return s.Missing(ctx, ds)
}

// find asks the leaders of the live generations for a blob and adds it to the index.
func (s *Store) find(ctx context.Context, d digest.Digest) (bool, error) {
	for _, g := range s.generations() {
		found, err := s.findIn(ctx, g, d)
		if err != nil {
			if v, e := s.ask(ctx); e != nil || g.number > v.Dropped {
				return false, err
			}
		}
		if found {
			return true, nil
		}
	}
	return false, nil
}

func (s *Store) findIn(ctx context.Context, g *generation, d digest.Digest) (bool, error) {
	b := g.bucket(d)
	if b == nil || g.number <= s.known().Dropped {
		return false, nil
	}
	var found bool
	var err error
	if b.family == small {
		err = s.small.subjects(ctx, b.stream, b.chunks+tail(d), func(string) { found = true })
	} else {
		_, err = s.findObject(ctx, b, d, true)
		found = err == nil
	}
	if errors.Is(err, cas.ErrNotFound) {
		return false, nil
	}
	if found {
		s.index.set(keyOf(d), newEntry(b, d.Size()))
	}
	return found, err
}
