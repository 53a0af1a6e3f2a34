package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/upstream"
	"github.com/jetfarm/jetfarm/frontend"
)

// fixture is a tier over a store in memory, before a farm whose blobs are behind a gate.
type fixture struct {
	*upstream.Tier
	local   *castest.Memory
	faulty  *castest.Faulty // what the tier sees of local
	farm    *farm
	gate    *gate
	client  *upstream.Client
	metrics *prometheus.Registry
	stop    func()
}

// start makes a fixture whose gate lets so many bytes pass; the change is for the tier.
func start(t testing.TB, after int, changes ...func(*upstream.Tier)) *fixture {
	t.Helper()
	x := &fixture{local: castest.NewMemory(), metrics: prometheus.NewRegistry()}
	x.faulty = &castest.Faulty{Store: x.local}
	x.farm = startFarm(t, func(cfg *frontend.Config) {
		x.gate = newGate(cfg.Blobs, after)
		cfg.Blobs = x.gate
	})
	x.client = connect(t, x.farm.address, func(cfg *upstream.Config) { cfg.Registerer = x.metrics })
	x.Tier = upstream.New(x.faulty, x.client)
	for _, change := range changes {
		change(x.Tier)
	}
	x.stop = run(t, x.Run)
	return x
}

// open opens a blob and closes the reader when the test ends.
func (x *fixture) open(t testing.TB, ctx context.Context, d digest.Digest) io.ReadCloser { //nolint:revive // the testing package's order
	t.Helper()
	r, err := x.Open(ctx, d, 0)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func readFull(t testing.TB, r io.Reader, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

func (x *fixture) wantNoFlights(t testing.TB) {
	t.Helper()
	eventually(t, "the end of the fetches", func() bool {
		flights, _ := x.Flights()
		return flights == 0
	})
}

// callers waits until so many read or wait for fetches.
func (x *fixture) callers(t testing.TB, n int) {
	t.Helper()
	eventually(t, "the callers of the fetches", func() bool {
		_, callers := x.Flights()
		return callers == n
	})
}

// held is how many bytes a closed gate of these tests lets pass: two frames of a compressed transfer.
const held = 1 << 20

func TestSharedFetch(t *testing.T) {
	t.Run("audit 11 the first caller leaves and the others get the blob", func(t *testing.T) {
		x := start(t, held)
		d, data := add(t, x.farm.blobs, 3<<20)
		ctx, cancel := context.WithCancelCause(t.Context())
		first := x.open(t, ctx, d)
		readFull(t, first, held/2)
		var others sync.WaitGroup
		for range 5 {
			others.Go(func() {
				got, err := read(t.Context(), x, d)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("a follower got %d bytes of %d, error %v", len(got), len(data), err)
				}
			})
		}
		x.callers(t, 6)
		cancel(errStop)
		if _, err := io.Copy(io.Discard, first); !errors.Is(err, errStop) {
			t.Errorf("the first caller: error %v, want %v", err, errStop)
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		x.callers(t, 5)
		x.gate.open()
		others.Wait()
		if n := x.gate.opens.Load(); n != 1 {
			t.Errorf("the upstream was read %d times, want once", n)
		}
		x.wantNoFlights(t)
	})
	t.Run("audit 11 the last caller ends it", func(t *testing.T) {
		x := start(t, held)
		d, _ := add(t, x.farm.blobs, 3<<20)
		var readers []io.ReadCloser
		for range 3 {
			readers = append(readers, x.open(t, t.Context(), d))
		}
		for i, r := range readers {
			if flights, callers := x.Flights(); flights != 1 || callers != 3-i {
				t.Errorf("%d fetches with %d callers, want 1 with %d", flights, callers, 3-i)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
		x.wantNoFlights(t)
		eventually(t, "the end of the upstream's reader", func() bool { return x.gate.reading.Load() == 0 })
		eventually(t, "the end of the upstream's calls", func() bool { return x.farm.calls(t) == 0 })
		if has(t, x.local, d) {
			t.Error("half a blob was stored")
		}
		x.gate.open()
	})
	t.Run("audit 11 evicted and fetched again", func(t *testing.T) {
		x := start(t, held)
		x.gate.open()
		for _, size := range []int{100, 1 << 20} {
			d, data := add(t, x.farm.blobs, size)
			for range 3 {
				wantBlob(t, x, d, data)
				eventually(t, "the blob in the store", func() bool { return has(t, x.local, d) })
				x.local.Remove(d)
			}
		}
	})
	t.Run("audit 11 evicted as soon as it is stored", func(t *testing.T) {
		x := start(t, held, func(s *upstream.Tier) { s.SetPatience(50 * time.Millisecond) })
		x.faulty.Plan = func(op castest.Op, _ digest.Digest) castest.Fault { return castest.Fault{Lie: op == castest.OpPut} }
		d, data := add(t, x.farm.blobs, 3<<20)
		first := x.open(t, t.Context(), d)
		readFull(t, first, held)
		late := make(chan error, 1)
		go func() {
			r, err := x.Open(t.Context(), d, 0)
			if err == nil {
				var got []byte
				if got, err = io.ReadAll(r); err == nil && !bytes.Equal(got, data) {
					err = errors.New("wrong bytes")
				}
				err = errors.Join(err, r.Close())
			}
			late <- err
		}()
		x.callers(t, 2)
		x.gate.open()
		if err := <-late; err != nil && !errors.Is(err, cas.ErrUnavailable) {
			t.Errorf("error %v, want none or ErrUnavailable", err)
		}
	})
	t.Run("audit 18 a stalled writer holds up nobody", func(t *testing.T) {
		x := start(t, held)
		x.gate.open()
		d, data := add(t, castest.NewMemory(), 3<<20)
		ctx, cancel := context.WithCancelCause(t.Context())
		var stalled sync.WaitGroup
		begun := make(chan struct{})
		stalled.Go(func() {
			err := x.Put(ctx, d, io.MultiReader(bytes.NewReader(data[:1<<20]), readerFunc(func([]byte) (int, error) {
				close(begun)
				<-ctx.Done()
				return 0, context.Cause(ctx)
			})))
			if !errors.Is(err, errStop) {
				t.Errorf("the stalled writer: error %v", err)
			}
		})
		<-begun
		if err := x.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
			t.Errorf("the other writer: %v", err)
		}
		wantBlob(t, x, d, data)
		cancel(errStop)
		stalled.Wait()
	})
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestFirstBytesComeBeforeTheLast(t *testing.T) {
	x := start(t, held)
	d, data := add(t, x.farm.blobs, 5<<20)
	r := x.open(t, t.Context(), d)
	if got := readFull(t, r, held); !bytes.Equal(got, data[:held]) {
		t.Error("wrong bytes")
	}
	if has(t, x.local, d) {
		t.Error("the blob is here before it was read at the upstream")
	}
	x.gate.open()
	if rest, err := io.ReadAll(r); err != nil || !bytes.Equal(rest, data[held:]) {
		t.Errorf("the rest: %d bytes, error %v", len(rest), err)
	}
	eventually(t, "the blob in the store", func() bool { return has(t, x.local, d) })
	wantBlob(t, x.local, d, data)
}

func TestReadFromAnOffset(t *testing.T) {
	x := start(t, held)
	x.gate.open()
	for _, size := range []int64{1000, 5 << 20} {
		for _, offset := range []int64{1, size / 2, size - 1, size} {
			d, data := add(t, x.farm.blobs, int(size))
			r, err := x.Open(t.Context(), d, offset)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[offset:]) {
				t.Errorf("%d bytes from %d of %d, error %v", len(got), offset, size, err)
			}
			eventually(t, "the whole blob in the store", func() bool { return has(t, x.local, d) })
		}
	}
}

// A reader that stops holds a fetch up for a while and then goes on from the stored copy.
func TestSlowReader(t *testing.T) {
	x := start(t, held, func(s *upstream.Tier) { s.SetPatience(50 * time.Millisecond) })
	d, data := add(t, x.farm.blobs, 4*upstream.WindowBytes)
	slow := x.open(t, t.Context(), d)
	head := readFull(t, slow, 1000)
	x.gate.open()
	got, err := read(t.Context(), x, d)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("beside a reader that stands still: %d bytes, error %v", len(got), err)
	}
	rest, err := io.ReadAll(slow)
	if err != nil || !bytes.Equal(append(head, rest...), data) {
		t.Errorf("the slow reader: %d bytes of %d, error %v", len(head)+len(rest), len(data), err)
	}
	if n := values(t, x.metrics)["jetfarm_upstream_slow_readers_total"]; n < 1 {
		t.Errorf("%v slow readers were counted, want at least one", n)
	}
	if n := x.gate.opens.Load(); n != 1 {
		t.Errorf("the upstream was read %d times, want once", n)
	}
}

// A blob that the own store does not take is served all the same.
func TestOwnStoreIsFull(t *testing.T) {
	for name, after := range map[string]int64{"at once": -1, "midway": 1 << 20} {
		t.Run(name, func(t *testing.T) {
			x := start(t, held)
			x.faulty.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
				if op == castest.OpPut {
					return castest.Fault{After: after, Err: cas.ErrFull}
				}
				return castest.Fault{}
			}
			d, data := add(t, x.farm.blobs, 5<<20)
			first := x.open(t, t.Context(), d)
			head := readFull(t, first, 1)
			var late sync.WaitGroup
			late.Go(func() {
				got, err := read(t.Context(), x, d)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("who came later: %d bytes, error %v", len(got), err)
				}
			})
			x.gate.open()
			rest, err := io.ReadAll(first)
			if err != nil || !bytes.Equal(append(head, rest...), data) {
				t.Errorf("%d bytes of %d, error %v", 1+len(rest), len(data), err)
			}
			late.Wait()
			x.wantNoFlights(t)
		})
	}
}

func TestMissingIsAnsweredHere(t *testing.T) {
	t.Run("audit 15 what only the upstream has is missing", func(t *testing.T) {
		x := start(t, held)
		d, _ := add(t, x.farm.blobs, 1000)
		for name, ask := range map[string]func(context.Context, []digest.Digest) ([]digest.Digest, error){"Missing": x.Missing, "Confirm": x.Confirm} {
			missing, err := ask(t.Context(), []digest.Digest{d})
			if err != nil || len(missing) != 1 {
				t.Errorf("%s = %v, %v; want the blob", name, missing, err)
			}
		}
		if n := x.gate.asked.Load(); n != 0 {
			t.Errorf("the upstream was asked %d times", n)
		}
	})
	t.Run("audit 15 D-34 a put that failed here is not present and not copied", func(t *testing.T) {
		x := start(t, held)
		broken := errors.New("the store failed")
		x.faulty.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
			if op == castest.OpPut {
				return castest.Fault{After: -1, Err: broken}
			}
			return castest.Fault{}
		}
		data := random(1000)
		d := space.Of(data)
		wantError(t, "Put", x.Put(t.Context(), d, bytes.NewReader(data)), broken)
		x.stop() // which copies what is queued
		if has(t, x.local, d) || has(t, x.farm.blobs, d) {
			t.Error("the blob is somewhere")
		}
	})
}

func TestDamagedUpstream(t *testing.T) {
	x := start(t, held)
	x.gate.open()
	memory := castest.NewMemory()
	x.gate.Store = memory
	for _, size := range []int{1000, 1 << 20} {
		d, data := add(t, memory, size)
		memory.Corrupt(d, make([]byte, size))
		if got, err := read(t.Context(), x, d); !errors.Is(err, cas.ErrNotFound) && !errors.Is(err, cas.ErrMismatch) {
			t.Errorf("a damaged blob: %d bytes, error %v", len(got), err)
		}
		if has(t, x.local, d) {
			t.Error("a damaged blob was stored")
		}
		memory.Corrupt(d, data)
		wantBlob(t, x, d, data)
	}
}

func TestReadBatch(t *testing.T) {
	x := start(t, held)
	x.gate.open()
	var ds []digest.Digest
	var want [][]byte
	for i := range 60 {
		var d digest.Digest
		var data []byte
		switch i % 3 {
		case 0:
			d, data = add(t, x.local, 100+i)
		case 1:
			d, data = add(t, x.farm.blobs, 100+i)
		default:
			d = space.Of(random(100))
		}
		ds, want = append(ds, d), append(want, data)
	}
	got, errs := x.ReadBatch(t.Context(), ds)
	for i := range ds {
		if want[i] == nil {
			wantError(t, "a blob that nobody has", errs[i], cas.ErrNotFound)
		} else if errs[i] != nil || !bytes.Equal(got[i], want[i]) {
			t.Errorf("blob %d: %d bytes, error %v", i, len(got[i]), errs[i])
		}
	}
}

func TestWriteThrough(t *testing.T) {
	t.Run("small and large blobs, once", func(t *testing.T) {
		x := start(t, held)
		x.gate.open()
		var ds []digest.Digest
		for i := range 40 {
			d, _ := add(t, x, 1+i*i*1500)
			ds = append(ds, d)
		}
		known, _ := add(t, x.farm.blobs, 1000)
		eventually(t, "the blobs at the upstream", func() bool {
			missing, err := x.farm.blobs.Missing(t.Context(), append(ds, known))
			return err == nil && len(missing) == 0
		})
	})
	t.Run("what is left is copied at the end", func(t *testing.T) {
		x := start(t, held)
		var ds []digest.Digest
		var data [][]byte
		for i := range 2000 {
			data = append(data, random(100+i))
			ds = append(ds, space.Of(data[i]))
		}
		for _, err := range x.PutBatch(t.Context(), ds, data) {
			if err != nil {
				t.Fatal(err)
			}
		}
		x.stop()
		if missing, err := x.farm.blobs.Missing(t.Context(), ds); err != nil || len(missing) > 0 {
			t.Errorf("%d of %d blobs are not at the upstream, error %v", len(missing), len(ds), err)
		}
	})
	t.Run("a full queue drops", func(t *testing.T) {
		farm := startFarm(t)
		metrics := prometheus.NewRegistry()
		client := connect(t, farm.address, func(cfg *upstream.Config) { cfg.Queue, cfg.Registerer = 10, metrics })
		s := upstream.New(castest.NewMemory(), client) // does not run
		for range 30 {
			add(t, s, 100)
		}
		sums := values(t, metrics)
		if sums["jetfarm_upstream_copies_total blob full"] != 20 || sums["jetfarm_upstream_queue_entries blob"] != 10 {
			t.Errorf("of 30 blobs with room for 10: %v", sums)
		}
	})
	t.Run("nothing is queued for an upstream that is down", func(t *testing.T) {
		metrics := prometheus.NewRegistry()
		client := connect(t, "127.0.0.1:1", func(cfg *upstream.Config) { cfg.Registerer = metrics })
		s := tier(t, castest.NewMemory(), client)
		for range 30 {
			add(t, s, 100)
		}
		sums := values(t, metrics)
		if sums["jetfarm_upstream_copies_total blob down"] != 30 || sums["jetfarm_upstream_queue_entries blob"] != 0 {
			t.Errorf("of 30 blobs: %v", sums)
		}
	})
}
