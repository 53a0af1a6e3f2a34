package objectstore_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// limited is the configuration of a store that keeps its streams within a budget.
func limited(t testing.TB, f *brokertest.Farm, budget int64) objectstore.Config {
	t.Helper()
	cfg := config(t, f)
	cfg.Maintain, cfg.MaxSize = true, budget
	return cfg
}

// rotating returns a store that has seen itself or another keep the generations.
func rotating(t testing.TB, cfg objectstore.Config) *objectstore.Store {
	t.Helper()
	s := running(t, cfg)
	eventually(t, "somebody keeps the generations", func() bool {
		u, err := s.Usage(t.Context())
		return err == nil && u.Limit == cfg.MaxSize
	})
	return s
}

// streams returns the state of all streams of blobs.
func streams(t testing.TB, js jetstream.JetStream) map[string]jetstream.StreamState {
	t.Helper()
	states := make(map[string]jetstream.StreamState)
	list := js.ListStreams(t.Context(), jetstream.WithStreamListSubject("$O.>"))
	for info := range list.Info() {
		states[info.Config.Name] = info.State
	}
	if err := list.Err(); err != nil {
		t.Errorf("list streams: %v", err)
	}
	return states
}

func totalBytes(t testing.TB, js jetstream.JetStream) (total int64) {
	t.Helper()
	for _, state := range streams(t, js) {
		total += int64(state.Bytes)
	}
	return total
}

func newJetStream(t testing.TB, nc *nats.Conn) jetstream.JetStream { //nolint:ireturn // the library has no type for it
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// A blob as a test knows it.
type kept struct {
	digest digest.Digest
	data   []byte
}

// put stores a new blob. Like a client it comes again when a busy machine has made no room within the
// store's own bound, which it does until a minute has passed.
func put(t testing.TB, s cas.Store, size int) kept {
	t.Helper()
	d, data := castest.Blob(castest.Space(t, ""), size)
	var err error
	for end := time.Now().Add(time.Minute); ; {
		err = s.Put(t.Context(), d, bytes.NewReader(data))
		if !errors.Is(err, cas.ErrFull) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Errorf("Put of %d bytes: %v", size, err)
	}
	return kept{d, data}
}

// checkRead reports a blob that cannot be read whole.
func checkRead(t testing.TB, s cas.Store, k kept) {
	t.Helper()
	got, err := cas.ReadAll(t.Context(), s, k.digest, k.digest.Size())
	if err != nil || !bytes.Equal(got, k.data) {
		t.Errorf("%d of %d bytes, error %v", len(got), len(k.data), err)
	}
}

// Many times the budget goes through two stores. The streams stay within it, what is asked for again
// and again stays, and each blob that is reported present can be read.
func TestRotationKeepsBudgetAndHotSet(t *testing.T) {
	t.Parallel()
	const budget, hotBlobs, writers = 96 << 20, 12, 3
	f := brokertest.Start(t)
	stores := []*objectstore.Store{rotating(t, limited(t, f, budget)), rotating(t, limited(t, f, budget))}
	var hot []kept
	for i := range hotBlobs {
		hot = append(hot, put(t, stores[0], []int{2000, 40_000, 700 << 10}[i%3]))
	}

	done := make(chan struct{})
	var watch, writing sync.WaitGroup
	var most atomic.Int64
	js := newJetStream(t, f.Connect(t))
	watch.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				most.Store(max(most.Load(), totalBytes(t, js)))
			}
		}
	})
	var written atomic.Int64
	for w := range writers {
		s := stores[w%len(stores)]
		writing.Go(func() {
			for i := w; written.Load() < 5*budget; i++ {
				k := put(t, s, []int{5000, 100_000, 900 << 10}[rand.IntN(3)])
				written.Add(k.digest.Size())
				h := hot[i%len(hot)]
				missing, err := s.Missing(t.Context(), []digest.Digest{h.digest})
				if err != nil || len(missing) > 0 {
					t.Errorf("hot blob: missing %v, error %v", missing, err)
				}
				checkRead(t, s, h)
				checkRead(t, s, k)
			}
		})
	}
	writing.Wait()
	close(done)
	watch.Wait()
	// Two processes may see the same room at the same time.
	if most.Load() > budget+budget/10 {
		t.Errorf("the streams had %d bytes, want at most %d", most.Load(), budget+budget/10)
	}
	for _, s := range stores {
		u, err := s.Usage(t.Context())
		if err != nil || len(u.Generations) < 5 || u.Generations[0].Number < 10 || u.Full != "" {
			t.Errorf("usage %+v, error %v", u, err)
		}
		for _, h := range hot {
			if got := missing(t, s, h.digest); len(got) != 0 {
				t.Errorf("a hot blob of %d bytes is missing", h.digest.Size())
			}
			checkRead(t, s, h)
		}
	}
}

// fill writes blobs that nobody asks for until the current generation is beyond a number.
func fill(t testing.TB, s *objectstore.Store, beyond uint32, size int) []kept {
	t.Helper()
	var written []kept
	for {
		u, err := s.Usage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n := len(u.Generations); n > 0 && u.Generations[n-1].Number > beyond {
			return written
		}
		if len(written) > 50_000 {
			t.Fatalf("no rotation after %d blobs: %+v", len(written), u)
		}
		written = append(written, put(t, s, size))
	}
}

// A blob that nobody asks for goes with its generation, from every store, and can be stored again.
func TestColdBlobsAreEvicted(t *testing.T) {
	t.Parallel()
	const budget = 8 << 20
	f := brokertest.Start(t)
	a, b := rotating(t, limited(t, f, budget)), rotating(t, limited(t, f, budget))
	cold := []kept{put(t, a, 1000), put(t, a, 600<<10)}
	for _, k := range cold {
		eventually(t, "the blob is announced", func() bool { return len(missing(t, b, k.digest)) == 0 })
	}
	fill(t, b, 12, 200<<10)
	for _, s := range []cas.Store{a, b} {
		for _, k := range cold {
			if got := missing(t, s, k.digest); len(got) != 1 {
				t.Errorf("a cold blob of %d bytes is present", k.digest.Size())
			}
			if _, err := s.Open(t.Context(), k.digest, 0); !errors.Is(err, cas.ErrNotFound) {
				t.Errorf("Open of a cold blob: error %v, want %v", err, cas.ErrNotFound)
			}
		}
	}
	for _, k := range cold {
		wantAgain(t, a, b, k.digest, k.data)
	}
}

// What is reported present is so in a generation that is not old, even if it was old before.
func TestOldBlobsAreCopiedBeforeTheyAreReported(t *testing.T) {
	t.Parallel()
	const budget = 64 << 20
	f := brokertest.Start(t)
	s := rotating(t, limited(t, f, budget))
	touch := map[string]func(k kept){
		"Missing": func(k kept) {
			if got := missing(t, s, k.digest); len(got) != 0 {
				t.Errorf("missing %v", got)
			}
		},
		"Confirm": func(k kept) {
			if got, err := s.Confirm(t.Context(), []digest.Digest{k.digest}); err != nil || len(got) != 0 {
				t.Errorf("missing %v, error %v", got, err)
			}
		},
		"Put": func(k kept) {
			if err := s.Put(t.Context(), k.digest, bytes.NewReader(k.data)); err != nil {
				t.Errorf("Put: %v", err)
			}
		},
		"Open": func(k kept) {
			checkRead(t, s, k)
			eventually(t, "a blob that is read is copied", func() bool { return s.GenerationOf(k.digest) > oldest(t, s) })
		},
	}
	blobs := make(map[string][]kept)
	for name := range touch {
		blobs[name] = []kept{put(t, s, 1000), put(t, s, 600<<10)}
	}
	for written := 0; s.Old() < s.GenerationOf(blobs["Put"][1].digest); written++ {
		put(t, s, 500<<10)
		if written > 1000 {
			t.Fatal("the first generations do not get old")
		}
	}
	for name, f := range touch {
		for _, k := range blobs[name] {
			before := s.GenerationOf(k.digest)
			f(k)
			if after := s.GenerationOf(k.digest); after <= s.Old() || after <= before {
				t.Errorf("%s: %d bytes are in generation %d, before in %d, those up to %d are old", name, k.digest.Size(), after, before, s.Old())
			}
			checkRead(t, s, k)
		}
	}
}

func oldest(t testing.TB, s *objectstore.Store) uint32 {
	t.Helper()
	u, err := s.Usage(t.Context())
	if err != nil || len(u.Generations) == 0 {
		t.Fatalf("usage %+v, error %v", u, err)
	}
	return u.Generations[0].Number
}

// With a retention, what was reported present stays, and uploads are refused until its time is over.
func TestRetentionRefusesUploads(t *testing.T) {
	t.Parallel()
	const budget = 8 << 20
	f := brokertest.Start(t)
	cfg := limited(t, f, budget)
	cfg.Retention = 3 * time.Second
	s := rotating(t, cfg)
	first := put(t, s, 1000)
	var err error
	for range 1000 {
		d, data := castest.Blob(castest.Space(t, ""), 200<<10)
		if err = s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
			break
		}
	}
	if !errors.Is(err, cas.ErrFull) {
		t.Fatalf("Put into a full store: error %v, want %v", err, cas.ErrFull)
	}
	if got := missing(t, s, first.digest); len(got) > 0 {
		t.Error("the first blob is missing")
	}
	checkRead(t, s, first)
	if err := s.Full(); !errors.Is(err, cas.ErrFull) {
		t.Errorf("Full: %v, want %v", err, cas.ErrFull)
	}
	eventually(t, "there is room again", func() bool { return s.Full() == nil })
	eventually(t, "uploads are taken again", func() bool {
		d, data := castest.Blob(castest.Space(t, ""), 200<<10)
		return s.Put(t.Context(), d, bytes.NewReader(data)) == nil
	})
}

func TestBlobLargerThanTheBudget(t *testing.T) {
	t.Parallel()
	const budget = 4 << 20
	f := brokertest.Start(t)
	s := rotating(t, limited(t, f, budget))
	d, data := castest.Blob(castest.Space(t, ""), budget+1)
	if err := s.Put(t.Context(), d, bytes.NewReader(data)); !errors.Is(err, cas.ErrFull) || !bytes.Contains([]byte(err.Error()), []byte("--cas-size")) {
		t.Errorf("Put: error %v, want %v that names the flag", err, cas.ErrFull)
	}
	if s.Full() != nil {
		t.Errorf("one blob that is too large makes the store full: %v", s.Full())
	}
	for range 3 { // each takes nearly everything
		k := put(t, s, budget*8/10)
		checkRead(t, s, k)
	}
}

// The age of a generation and the number of its blobs end it as well.
func TestRotationByCountAndAge(t *testing.T) {
	t.Parallel()
	f := brokertest.Start(t)
	cfg := config(t, f)
	cfg.Maintain, cfg.MaxBlobs = true, 5000
	s := rotating(t, cfg)
	written := fill(t, s, 12, 100)
	last := written[len(written)-1]
	eventually(t, "few enough blobs are left", func() bool {
		u, err := s.Usage(t.Context())
		return err == nil && u.Blobs <= 5000
	})
	if got := missing(t, s, last.digest); len(got) != 0 {
		t.Error("the last blob is missing")
	}

	f = brokertest.Start(t)
	cfg = config(t, f)
	cfg.Maintain, cfg.MaxAge = true, time.Millisecond
	s = rotating(t, cfg)
	put(t, s, 100)
	eventually(t, "an old generation is followed by a new one", func() bool {
		u, err := s.Usage(t.Context())
		return err == nil && len(u.Generations) > 1
	})
	if u, err := s.Usage(t.Context()); err != nil || len(u.Generations) > 3 {
		t.Errorf("an empty generation was followed by another: %+v, %v", u, err)
	}
}

func TestCollect(t *testing.T) {
	t.Parallel()
	const budget = 8 << 20
	f := brokertest.Start(t)
	operator := open(t, config(t, f))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := operator.Collect(ctx); err == nil {
		t.Error("Collect without a rotator succeeded")
	}
	s := rotating(t, limited(t, f, budget))
	fill(t, s, 9, 200<<10)
	before, err := s.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is old is dropped", func() bool {
		if err := operator.Collect(t.Context()); err != nil {
			t.Errorf("Collect: %v", err)
		}
		u, err := operator.Usage(t.Context())
		return err == nil && u.Bytes < before.Bytes && !slices.ContainsFunc(u.Generations, func(g objectstore.Generation) bool { return g.Old })
	})
}
