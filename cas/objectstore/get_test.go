package objectstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// Audit row 2: the broker goes silent in the middle of a blob.
func TestGetBlackholeMidObject(t *testing.T) {
	f := brokertest.Start(t)
	p := newProxy(t, f)
	const stall = 300 * time.Millisecond
	s := open(t, objectstore.Config{
		Small: p.connect(t), Bulk: p.connect(t), Log: logger(t), StallTimeout: stall, RequestTimeout: stall,
	})
	small, smallData := stored(t, s, 100<<10)
	large, _ := stored(t, s, 16<<20)

	r, err := s.Open(t.Context(), large, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	p.silent.Store(true)
	within(t, stall, "rest of the blob", cas.ErrUnavailable, func() error {
		_, err := io.Copy(io.Discard, r)
		return err
	})
	within(t, stall, "Open of a small blob", cas.ErrUnavailable, func() error {
		_, err := s.Open(t.Context(), small, 0)
		return err
	})
	within(t, stall, "Open of a large blob", cas.ErrUnavailable, func() error {
		_, err := s.Open(t.Context(), large, 0)
		return err
	})
	fresh, data := castest.Blob(castest.Space(t, ""), 1000)
	within(t, stall, "Put of a small blob", cas.ErrUnavailable, func() error {
		return s.Put(t.Context(), fresh, bytes.NewReader(data))
	})
	within(t, stall, "Confirm", cas.ErrUnavailable, func() error {
		_, err := s.Confirm(t.Context(), []digest.Digest{fresh})
		return err
	})
	// What a silent broker has dropped since is not known, so nothing is promised.
	within(t, stall, "Missing", cas.ErrUnavailable, func() error {
		_, err := s.Missing(t.Context(), []digest.Digest{small, large, fresh})
		return err
	})
	within(t, 0, "Open with a context that ends", errStop, func() error {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errStop)
		defer cancel()
		_, err := s.Open(ctx, small, 0)
		return err
	})

	p.silent.Store(false)
	p.cut()
	eventually(t, "the store works again", func() bool {
		got, err := cas.ReadAll(t.Context(), s, small, small.Size())
		return err == nil && bytes.Equal(got, smallData)
	})
}

// A Put of a large blob to a broker that goes silent ends after the stall bound and the bound of
// the attempt to clean up.
func TestPutBlackholeMidObject(t *testing.T) {
	f := brokertest.Start(t)
	p := newProxy(t, f)
	const stall = 300 * time.Millisecond
	s := open(t, objectstore.Config{
		Small: p.connect(t), Bulk: p.connect(t), Log: quiet(), StallTimeout: stall, RequestTimeout: stall,
	})
	d, data := castest.Blob(castest.Space(t, ""), 8<<20)
	read := 0
	source := bytes.NewReader(data)
	within(t, 2*stall, "Put", cas.ErrUnavailable, func() error {
		return s.Put(t.Context(), d, readerFunc(func(b []byte) (int, error) {
			n, err := source.Read(b)
			if read += n; read > 2<<20 {
				p.silent.Store(true)
			}
			return n, err
		}))
	})
	p.silent.Store(false)
	p.cut()
	eventually(t, "the store works again", func() bool {
		return s.Put(t.Context(), d, bytes.NewReader(data)) == nil
	})
}

// Audit row 2: what moves slowly is not cut off.
func TestGetSlowButAlive(t *testing.T) {
	t.Parallel()
	f := brokertest.Start(t)
	p := newProxy(t, f)
	const stall = 2 * time.Second
	s := open(t, objectstore.Config{Small: p.connect(t), Bulk: p.connect(t), Log: logger(t), StallTimeout: stall})
	d, data := stored(t, s, 8<<20)
	p.delay.Store(int64(40 * time.Millisecond)) // 64 KiB each
	start := time.Now()
	got, err := cas.ReadAll(t.Context(), s, d, d.Size())
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, error %v", len(got), err)
	}
	if took := time.Since(start); took < 2*stall {
		t.Errorf("the read took %v, too short to show anything", took)
	}
}

// A reader leaves nothing behind, in the client or in the broker.
func TestReadersLeaveNothing(t *testing.T) {
	f := brokertest.Start(t)
	cfg := config(t, f)
	s := open(t, cfg)
	d, _ := stored(t, s, 8<<20)
	read := func(n int64) {
		r, err := s.Open(t.Context(), d, n/2)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, r, n); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Errorf("Close: %v", err)
		}
		if _, err := r.Read(make([]byte, 1)); err == nil {
			t.Error("Read after Close succeeded")
		}
	}
	read(1)
	before := cfg.Bulk.NumSubscriptions()
	for i := range 50 {
		read(int64(1 + i*100_000))
	}
	if got := cfg.Bulk.NumSubscriptions(); got != before {
		t.Errorf("%d subscriptions after the reads, %d before", got, before)
	}
	if got := streamState(t, cfg.Small, largeStream).Consumers; got != 0 {
		t.Errorf("%d consumers", got)
	}
}

// rewrite replaces the stored messages of a filter by what change makes of them.
func rewrite(t *testing.T, f *brokertest.Farm, stream, filter string, change func(payloads [][]byte) [][]byte) {
	t.Helper()
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	var payloads [][]byte
	var subject string
	for sequence := uint64(1); sequence <= s.CachedInfo().State.LastSeq; sequence++ {
		if m, err := s.GetMsg(t.Context(), sequence, jetstream.WithGetMsgSubject(filter)); err == nil {
			payloads, subject, sequence = append(payloads, m.Data), m.Subject, m.Sequence
		}
	}
	if err := s.Purge(t.Context(), jetstream.WithPurgeSubject(filter)); err != nil {
		t.Fatal(err)
	}
	for _, payload := range change(payloads) {
		if _, err := js.Publish(t.Context(), subject, payload); err != nil {
			t.Fatal(err)
		}
	}
}

func flipLast(payloads [][]byte) [][]byte {
	last := payloads[len(payloads)-1]
	last[len(last)/2] ^= 1
	return payloads
}

func loseOne(payloads [][]byte) [][]byte { return slices.Delete(payloads, 1, 2) }

func shorten(payloads [][]byte) [][]byte {
	payloads[0] = payloads[0][1:]
	return payloads
}

// A damaged copy is never delivered as whole, and can be replaced by a Put.
func TestGetOfDamagedBlob(t *testing.T) {
	for name, test := range map[string]struct {
		size   int
		stream string
		filter string
		change func([][]byte) [][]byte
	}{
		"small":               {5000, smallStream, "$O.cas-s-1-0.C.>", flipLast},
		"large, last chunk":   {512<<10 + 5000, largeStream, "$O.cas-l-1-0.C.>", flipLast},
		"large, lost chunk":   {3<<20 + 5, largeStream, "$O.cas-l-1-0.C.>", loseOne},
		"large, short chunk":  {3<<20 + 5, largeStream, "$O.cas-l-1-0.C.>", shorten},
		"large, bad metadata": {3 << 20, largeStream, "$O.cas-l-1-0.M.>", flipLast},
	} {
		t.Run(name, func(t *testing.T) {
			f := brokertest.Start(t)
			cfg := config(t, f)
			cfg.Log = quiet()
			s, other := running(t, cfg), running(t, func() objectstore.Config { c := config(t, f); c.Log = quiet(); return c }())
			d, data := stored(t, s, test.size)
			eventually(t, "the other process knows the blob", func() bool { return len(missing(t, other, d)) == 0 })
			rewrite(t, f, test.stream, test.filter, test.change)

			want := cas.ErrMismatch
			r, err := s.Open(t.Context(), d, 0)
			if name == "large, bad metadata" {
				want = cas.ErrNotFound
			}
			if err == nil {
				_, err = io.Copy(io.Discard, r)
				r.Close()
			}
			if !errors.Is(err, want) {
				t.Errorf("read of a damaged blob: error %v, want %v", err, want)
			}
			if len(missing(t, s, d)) != 1 {
				t.Error("a damaged blob is still present")
			}
			if errors.Is(want, cas.ErrMismatch) {
				eventually(t, "the other process forgets the blob", func() bool { return len(missing(t, other, d)) == 1 })
			}
			if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Fatalf("Put of a damaged blob: %v", err)
			}
			if got, err := cas.ReadAll(t.Context(), other, d, d.Size()); err != nil || !bytes.Equal(got, data) {
				t.Errorf("after the repair: %d bytes, error %v", len(got), err)
			}
		})
	}
}

// stored puts a new blob.
func stored(t testing.TB, s cas.Store, size int) (digest.Digest, []byte) {
	t.Helper()
	d, data := castest.Blob(castest.Space(t, ""), size)
	if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatalf("Put: %v", err)
	}
	return d, data
}

func missing(t testing.TB, s cas.Store, ds ...digest.Digest) []digest.Digest {
	t.Helper()
	out, err := s.Missing(t.Context(), ds)
	if err != nil {
		t.Fatalf("Missing: %v", err)
	}
	return out
}

// within checks the error of a call that may take bound, and what a busy machine adds to it.
func within(t *testing.T, bound time.Duration, what string, want error, f func() error) {
	t.Helper()
	start := time.Now()
	err := f()
	if took := time.Since(start); took > bound+5*time.Second {
		t.Errorf("%s took %v, want not much more than %v", what, took, bound)
	}
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}
