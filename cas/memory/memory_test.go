package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/memory"
)

func TestConformance(t *testing.T) {
	for name, bytes := range map[string]int64{"roomy": 64 << 20, "tight": 100 << 10} {
		t.Run(name, func(t *testing.T) {
			castest.Run(t, func(tb testing.TB) cas.Store {
				tb.Helper()
				return start(tb, bytes).Tier
			})
			castest.RunFrames(t, func(tb testing.TB) cas.Store {
				tb.Helper()
				return start(tb, bytes).Tier
			})
			castest.RunResumer(t, func(tb testing.TB) cas.Store {
				tb.Helper()
				tier, err := memory.New(memory.Config{MaxBytes: bytes, Source: castest.NewResumable()})
				if err != nil {
					tb.Fatal(err)
				}
				return tier
			})
		})
	}
}

// fixture is a tier over a store in memory that counts its Opens.
type fixture struct {
	*memory.Tier
	source   *castest.Memory
	faulty   *castest.Faulty
	opens    atomic.Int64
	registry *prometheus.Registry
}

func start(t testing.TB, maxBytes int64) *fixture {
	t.Helper()
	x := &fixture{source: castest.NewMemory(), registry: prometheus.NewRegistry()}
	x.faulty = &castest.Faulty{Store: x.source, Plan: func(op castest.Op, _ digest.Digest) castest.Fault {
		if op == castest.OpOpen {
			x.opens.Add(1)
		}
		return castest.Fault{}
	}}
	tier, err := memory.New(memory.Config{MaxBytes: maxBytes, Source: x.faulty, Registerer: x.registry})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	x.Tier = tier
	return x
}

// blob returns a new blob that is in the source only.
func (x *fixture) blob(t testing.TB, size int) (digest.Digest, []byte) {
	t.Helper()
	d, data := castest.Blob(castest.Space(t, "memory"), size)
	if err := x.source.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	return d, data
}

func (x *fixture) want(t testing.TB, d digest.Digest, data []byte, opens int64) {
	t.Helper()
	before := x.opens.Load()
	got, err := cas.ReadAll(t.Context(), x, d, 1<<20)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("reading %v: %d bytes, error %v", d, len(got), err)
	}
	if n := x.opens.Load() - before; n != opens {
		t.Errorf("reading %v opened the source %d times, want %d", d, n, opens)
	}
}

func (x *fixture) used(t testing.TB) float64 {
	t.Helper()
	families, err := x.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "jetfarm_memory_used_bytes" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatal("there is no gauge")
	return 0
}

func TestReadsAreHeld(t *testing.T) {
	x := start(t, 64<<20)
	for _, size := range []int{1, 1000, memory.MaxBlob} {
		d, data := x.blob(t, size)
		if _, ok := cas.Peek(x.Tier, d); ok {
			t.Errorf("a blob of %d bytes is held before it was read", size)
		}
		x.want(t, d, data, 1)
		x.want(t, d, data, 0)
		if got, ok := cas.Peek(x.Tier, d); !ok || !bytes.Equal(got, data) {
			t.Errorf("a blob of %d bytes is not held after it was read", size)
		}
		// A blob that the source has lost is still readable, and still missing.
		x.source.Remove(d)
		x.want(t, d, data, 0)
		if missing, err := x.Missing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
			t.Errorf("Missing = %v, %v; want the blob that the source has lost", missing, err)
		}
	}
	d, data := x.blob(t, memory.MaxBlob+1)
	x.want(t, d, data, 1)
	x.want(t, d, data, 1)
	other, err := castest.Space(t, "other").New(d.Hash(), d.Size())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x.Open(t.Context(), other, 0); !errors.Is(err, cas.ErrNotFound) {
		t.Errorf("a blob of another key space: error %v", err)
	}
}

func TestReadFromAnOffset(t *testing.T) {
	x := start(t, 1<<20)
	d, data := x.blob(t, 1000)
	for range 2 {
		r, err := x.Open(t.Context(), d, 990)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[990:]) {
			t.Errorf("%d bytes, error %v", len(got), err)
		}
	}
	if n := x.opens.Load(); n != 1 {
		t.Errorf("%d Opens of the source, want 1", n)
	}
}

func TestWritesAreHeld(t *testing.T) {
	x := start(t, 64<<20)
	d, data := castest.Blob(castest.Space(t, ""), 1000)
	if err := x.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	if missing, err := x.source.Missing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 0 {
		t.Errorf("the source has not got the blob: %v", err)
	}
	x.want(t, d, data, 0)
}

// TestFailedWritesAreNotHeld: neither what the source refuses nor what it takes without a look.
func TestFailedWritesAreNotHeld(t *testing.T) {
	broken := errors.New("the source failed")
	for name, test := range map[string]struct {
		fault  castest.Fault
		change func([]byte) []byte
		want   error
	}{
		"the source fails": {castest.Fault{After: -1, Err: broken}, bytes.Clone, broken},
		"fails midway":     {castest.Fault{After: 500, Err: broken}, bytes.Clone, broken},
		"wrong bytes":      {castest.Fault{}, func(b []byte) []byte { return make([]byte, len(b)) }, cas.ErrMismatch},
		"wrong bytes, taken unseen": {
			castest.Fault{Lie: true},
			func(b []byte) []byte { return make([]byte, len(b)) }, nil,
		},
		"too long, taken unseen":  {castest.Fault{Lie: true}, func(b []byte) []byte { return append(bytes.Clone(b), 1) }, nil},
		"too short, taken unseen": {castest.Fault{Lie: true}, func(b []byte) []byte { return b[:len(b)-1] }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			x := start(t, 64<<20)
			x.faulty.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
				if op == castest.OpPut {
					return test.fault
				}
				return castest.Fault{}
			}
			d, data := castest.Blob(castest.Space(t, ""), 1000)
			if err := x.Put(t.Context(), d, bytes.NewReader(test.change(data))); !errors.Is(err, test.want) {
				t.Errorf("Put: error %v, want %v", err, test.want)
			}
			if _, err := x.Open(t.Context(), d, 0); !errors.Is(err, cas.ErrNotFound) {
				t.Errorf("Open: error %v, want ErrNotFound", err)
			}
			if _, ok := x.Peek(d); ok {
				t.Error("the blob is held")
			}
		})
	}
}

func TestBadSource(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 1000)
	x.source.Corrupt(d, make([]byte, 1000))
	if _, err := cas.ReadAll(t.Context(), x, d, 1000); !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("a damaged blob: error %v", err)
	}
	x.source.Corrupt(d, data)
	x.want(t, d, data, 1)
}

// TestBound: the tier stays within its bytes, and what is read again and again stays in the tier.
func TestBound(t *testing.T) {
	for _, limit := range []int64{1 << 20, 32 << 20} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			x := start(t, limit)
			var hot []digest.Digest
			for range 20 {
				d, _ := x.blob(t, 1000)
				hot = append(hot, d)
			}
			read := func(d digest.Digest) {
				if _, err := cas.ReadAll(t.Context(), x, d, memory.MaxBlob); err != nil {
					t.Fatal(err)
				}
			}
			for passed := int64(0); passed < 4*limit; {
				d, _ := x.blob(t, 1+rand.IntN(memory.MaxBlob))
				read(d)
				passed += d.Size()
				x.source.Remove(d)
				for _, d := range hot {
					read(d)
				}
				if used := x.used(t); used > float64(limit) {
					t.Fatalf("%.0f bytes are held, %d are allowed", used, limit)
				}
			}
			if used := x.used(t); used < float64(limit)/2 {
				t.Errorf("only %.0f bytes of %d are held", used, limit)
			}
			for _, d := range hot {
				x.source.Remove(d)
				if _, ok := x.Peek(d); !ok {
					t.Error("a hot blob is not held")
				}
			}
		})
	}
}

func TestConcurrentUse(t *testing.T) {
	x := start(t, 300<<10)
	type blob struct {
		d    digest.Digest
		data []byte
	}
	var blobs []blob
	for i := range 50 {
		d, data := x.blob(t, 1+i*400)
		blobs = append(blobs, blob{d, data})
	}
	var g errgroup.Group
	for worker := range 8 {
		random := rand.New(rand.NewPCG(uint64(worker), 7))
		g.Go(func() error {
			for range 2000 {
				b := blobs[random.IntN(len(blobs))]
				if random.IntN(4) == 0 {
					if err := x.Put(t.Context(), b.d, bytes.NewReader(b.data)); err != nil {
						return err
					}
				}
				got, ok := x.Peek(b.d)
				if !ok {
					var err error
					if got, err = cas.ReadAll(t.Context(), x, b.d, 1<<20); err != nil {
						return err
					}
				}
				if !bytes.Equal(got, b.data) {
					return errors.New("wrong bytes")
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if used := x.used(t); used > 300<<10 {
		t.Errorf("%.0f bytes are held", used)
	}
}

func TestStalledSource(t *testing.T) {
	x := start(t, 1<<20)
	d, data := x.blob(t, 1000)
	x.faulty.Plan = func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{After: 500, Stall: true} }
	stop := errors.New("the test ended this context")
	ctx, cancel := context.WithCancelCause(t.Context())
	var g errgroup.Group
	g.Go(func() error {
		_, err := cas.ReadAll(ctx, x, d, 1000)
		return err
	})
	cancel(stop)
	if err := g.Wait(); !errors.Is(err, stop) {
		t.Errorf("a stalled read: error %v", err)
	}
	x.faulty.Plan = nil
	x.want(t, d, data, 0)
	if _, ok := x.Peek(d); !ok {
		t.Error("the blob is not held")
	}
}

// TestResumer: uploads that are resumed go to the source, and one that keeps none says so.
func TestResumer(t *testing.T) {
	x := start(t, 1<<20)
	d, data := castest.Blob(castest.Space(t, ""), 1000)
	if n, err := x.Committed(t.Context(), d, "upload"); n != 0 || err != nil {
		t.Errorf("Committed = %d, %v", n, err)
	}
	if err := x.PutFrom(t.Context(), d, "upload", 500, bytes.NewReader(data[500:])); !errors.Is(err, cas.ErrNotKept) {
		t.Errorf("PutFrom the middle: error %v", err)
	}
	if err := x.PutFrom(t.Context(), d, "upload", 0, bytes.NewReader(data)); err != nil {
		t.Errorf("PutFrom the start: error %v", err)
	}
	x.want(t, d, data, 0)
}

func TestMetrics(t *testing.T) {
	x := start(t, 1<<20)
	d, data := x.blob(t, 1000)
	x.want(t, d, data, 1)
	x.want(t, d, data, 0)
	families, err := x.registry.Gather()
	if err != nil || len(families) != 6 {
		t.Errorf("%d metrics, error %v; want 6", len(families), err)
	}
	if _, err := memory.New(memory.Config{MaxBytes: 1, Registerer: x.registry}); err == nil {
		t.Error("a second tier with the same metrics succeeded")
	}
	if _, err := memory.New(memory.Config{}); err == nil {
		t.Error("a tier without room succeeded")
	}
}

func BenchmarkPeek1KiB(b *testing.B) {
	x := start(b, 64<<20)
	var ds []digest.Digest
	for range 1000 {
		d, data := x.blob(b, 1<<10)
		x.want(b, d, data, 1)
		ds = append(ds, d)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, ok := x.Peek(ds[i%len(ds)]); !ok {
			b.Fatal("not held")
		}
	}
}

func BenchmarkMemoryRead1KiB(b *testing.B) {
	x := start(b, 64<<20)
	d, data := x.blob(b, 1<<10)
	x.want(b, d, data, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := cas.ReadAll(b.Context(), x, d, 1<<20); err != nil {
			b.Fatal(err)
		}
	}
}
