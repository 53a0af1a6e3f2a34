package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/upstream"
)

// soon fails the test when f takes far longer than any bound of these tests.
func soon(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	timer := time.NewTimer(30 * time.Second)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		t.Fatalf("%s did not end within 30 s", what)
	}
}

// stalling is a client through a proxy, with a short bound on stalls.
func stalling(t testing.TB, f *farm, stall time.Duration, changes ...func(*upstream.Config)) (*upstream.Client, *proxy) {
	t.Helper()
	p := newProxy(t, f.address)
	changes = append(changes, func(cfg *upstream.Config) { cfg.Stall = stall })
	return connect(t, p.address(), changes...), p
}

const shortStall = 200 * time.Millisecond

// TestSilentUpstream is audit rows 2, 13 and 16: an upstream that keeps its connections and says
// nothing ends each call within the bound on stalls, as cas.ErrUnavailable.
func TestSilentUpstream(t *testing.T) {
	f := startFarm(t)
	small, _ := add(t, f.blobs, 100)
	large, _ := add(t, f.blobs, 16<<20)
	fresh := random(16 << 20)
	calls := map[string]func(c *upstream.Client) error{
		"Missing": func(c *upstream.Client) error {
			_, err := c.Missing(t.Context(), []digest.Digest{small})
			return err
		},
		"a small read": func(c *upstream.Client) error { _, err := read(t.Context(), c, small); return err },
		"a large read": func(c *upstream.Client) error { _, err := read(t.Context(), c, large); return err },
		"a small write": func(c *upstream.Client) error {
			return c.Put(t.Context(), space.Of(fresh[:100]), bytes.NewReader(fresh[:100]))
		},
		"a large write": func(c *upstream.Client) error { return c.Put(t.Context(), space.Of(fresh), bytes.NewReader(fresh)) },
		"a result":      func(c *upstream.Client) error { _, err := c.Result(t.Context(), small); return err },
	}
	for name, call := range calls {
		t.Run("audit 2 16 D-40 from the start of "+name, func(t *testing.T) {
			c, p := stalling(t, f, shortStall)
			p.silent.Store(true)
			soon(t, name, func() {
				err := call(c)
				if !errors.Is(err, cas.ErrUnavailable) || errors.Is(err, upstream.ErrRefused) {
					t.Errorf("error %v, want ErrUnavailable", err)
				}
			})
		})
	}
	for _, name := range []string{"a large read", "a large write"} {
		t.Run("audit 2 13 16 D-39 D-40 in the middle of "+name, func(t *testing.T) {
			c, p := stalling(t, f, shortStall)
			p.silentAfter.Store(2 << 20)
			soon(t, name, func() {
				if err := calls[name](c); !errors.Is(err, cas.ErrUnavailable) {
					t.Errorf("error %v, want ErrUnavailable", err)
				}
			})
			p.cut()
		})
	}
	t.Run("audit 2 a connection that is accepted and nothing else", func(t *testing.T) {
		p := newProxy(t, f.address)
		p.silent.Store(true)
		soon(t, "Open and Missing", func() {
			c := connect(t, p.address(), func(cfg *upstream.Config) { cfg.Stall = shortStall })
			_, err := c.Missing(t.Context(), []digest.Digest{small})
			wantError(t, "Missing", err, upstream.ErrDown)
		})
	})
	t.Run("audit 15 a call whose context ends says why", func(t *testing.T) {
		c, p := stalling(t, f, time.Hour)
		p.silent.Store(true)
		for name, call := range map[string]func(ctx context.Context) error{
			"Missing": func(ctx context.Context) error {
				_, err := c.Missing(ctx, []digest.Digest{small})
				return err
			},
			"a read":  func(ctx context.Context) error { _, err := read(ctx, c, large); return err },
			"a write": func(ctx context.Context) error { return c.Put(ctx, space.Of(fresh), bytes.NewReader(fresh)) },
		} {
			ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, errStop)
			soon(t, name, func() { wantError(t, name, call(ctx), errStop) })
			cancel()
		}
		p.cut()
	})
	eventually(t, "the end of the upstream's calls", func() bool { return f.calls(t) == 0 })
}

// TestSlowUpstream is the other half of audit row 2: a transfer that takes much longer than the bound
// on stalls lives on while it moves.
func TestSlowUpstream(t *testing.T) {
	const stall = 2 * time.Second
	f := startFarm(t)
	c, p := stalling(t, f, stall)
	d, data := add(t, f.blobs, 10<<20)
	fresh := random(10 << 20)
	p.delay.Store(int64(20 * time.Millisecond)) // for 32 KiB
	for name, transfer := range map[string]func() error{
		"read": func() error {
			got, err := read(t.Context(), c, d)
			if err == nil && !bytes.Equal(got, data) {
				t.Error("wrong bytes")
			}
			return err
		},
		"write": func() error { return c.Put(t.Context(), space.Of(fresh), bytes.NewReader(fresh)) },
	} {
		begun := time.Now()
		if err := transfer(); err != nil {
			t.Errorf("a slow %s: %v", name, err)
		}
		if took := time.Since(begun); took < stall {
			t.Errorf("the %s took %v, which is not slow", name, took)
		}
	}
}

// TestSlowFarm: an upstream is not taken for stalled while this side takes its time.
func TestSlowFarm(t *testing.T) {
	f := startFarm(t)
	const stall = time.Second
	c, _ := stalling(t, f, stall)
	d, data := add(t, f.blobs, 16<<20)
	pause := func(r io.Reader) io.Reader {
		n := 0
		return readerFunc(func(p []byte) (int, error) {
			if n++; n%200 == 1 {
				<-time.NewTimer(stall + stall/2).C
			}
			return r.Read(p[:min(len(p), 64<<10)])
		})
	}
	r, err := c.Open(t.Context(), d, 0)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(pause(r))
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data) {
		t.Errorf("a slow reader: %d bytes, error %v", len(got), err)
	}
	fresh := random(16 << 20)
	if err := c.Put(t.Context(), space.Of(fresh), pause(bytes.NewReader(fresh))); err != nil {
		t.Errorf("a slow writer: %v", err)
	}
}

// TestBrokenTransfer: a fetch whose connection dies goes on where it was.
func TestBrokenTransfer(t *testing.T) {
	f := startFarm(t)
	metrics := prometheus.NewRegistry()
	c, p := stalling(t, f, 20*time.Second, func(cfg *upstream.Config) { cfg.Registerer = metrics })
	s := tier(t, castest.NewMemory(), c)
	d, data := add(t, f.blobs, 16<<20)
	p.cutAfter.Store(5 << 20)
	wantBlob(t, s, d, data)
	if n := values(t, metrics)["jetfarm_upstream_resumed_fetches_total"]; n < 1 {
		t.Errorf("%v fetches went on, want at least one", n)
	}
}

// TestDeadUpstream: an upstream that is gone costs a few calls, is not asked then, and is asked again
// when it is back.
func TestDeadUpstream(t *testing.T) {
	f := startFarm(t)
	metrics := prometheus.NewRegistry()
	c, p := stalling(t, f, 20*time.Second, func(cfg *upstream.Config) { cfg.Registerer = metrics })
	local := castest.NewMemory()
	s := tier(t, local, c)
	d, data := add(t, f.blobs, 100)
	here, hereData := add(t, local, 100)
	p.refusing.Store(true)
	p.cut()
	eventually(t, "a read that does not fail", func() bool {
		_, err := read(t.Context(), s, d)
		if !errors.Is(err, cas.ErrNotFound) {
			wantError(t, "a read while the upstream counts", err, cas.ErrUnavailable)
		}
		return errors.Is(err, cas.ErrNotFound)
	})
	if !c.Down() {
		t.Error("the upstream does not count as down")
	}
	wantBlob(t, s, here, hereData)
	asked := values(t, metrics)["jetfarm_upstream_requests_total BatchReadBlobs Unavailable"]
	for range 100 {
		_, err := read(t.Context(), s, d)
		wantError(t, "a read while the upstream is down", err, cas.ErrNotFound)
	}
	// The codes come before the methods in the order of the labels.
	if now := values(t, metrics)["jetfarm_upstream_requests_total BatchReadBlobs Unavailable"]; now != asked {
		t.Errorf("%v calls were made while it was down", now-asked)
	}
	p.refusing.Store(false)
	eventually(t, "the blob of the upstream that is back", func() bool {
		got, err := read(t.Context(), s, d)
		return err == nil && bytes.Equal(got, data)
	})
	if values(t, metrics)["jetfarm_upstream_up"] != 1 {
		t.Error("the gauge says that it is down")
	}
}

// TestDrainIsBounded: what is queued for a silent upstream does not keep the process.
func TestDrainIsBounded(t *testing.T) {
	f := startFarm(t)
	c, p := stalling(t, f, time.Hour, func(cfg *upstream.Config) { cfg.Drain = 50 * time.Millisecond })
	s := upstream.New(castest.NewMemory(), c)
	stop := run(t, s.Run)
	p.silent.Store(true)
	for range 100 {
		add(t, s, 100<<10)
	}
	soon(t, "the end of Run", stop)
	p.cut()
}

// goroutines returns how many are in code of this package's subject.
func goroutines() int {
	buffer := make([]byte, 4<<20)
	buffer = buffer[:runtime.Stack(buffer, true)]
	count := 0
	for g := range bytes.SplitSeq(buffer, []byte("\n\n")) {
		if bytes.Contains(g, []byte("jetfarm/cas/upstream.(")) {
			count++
		}
	}
	return count
}

// TestRandomCancels is audit rows 1 to 4, 6 and T1 to T5: 200 transfers that end at random points, by
// their caller or by the network, leave no goroutine, no call and no flight.
func TestRandomCancels(t *testing.T) {
	f := startFarm(t)
	p := newProxy(t, f.address)
	c := connect(t, p.address())
	s := tier(t, newStorage(t).blobs, c)
	var ds []digest.Digest
	for i := range 40 {
		d, _ := add(t, f.blobs, 1+i*i*i*50)
		ds = append(ds, d)
	}
	eventually(t, "the goroutines of Run", func() bool { return goroutines() >= 6 })
	before := goroutines()
	var clients sync.WaitGroup
	for worker := range 8 {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 3))
			for range 25 {
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(random.IntN(20_000))*time.Microsecond, errStop)
				var err error
				switch d := ds[random.IntN(len(ds))]; random.IntN(5) {
				case 0:
					var r io.ReadCloser
					r, err = s.Open(ctx, d, random.Int64N(d.Size()))
					if err == nil {
						_, err = io.Copy(io.Discard, io.LimitReader(r, random.Int64N(d.Size())))
						err = errors.Join(err, r.Close())
					}
				case 1, 2:
					_, err = read(ctx, s, d)
				case 3:
					_, data := castest.Blob(space, 1+random.IntN(3<<20))
					err = c.Put(ctx, space.Of(data), bytes.NewReader(data))
				case 4:
					_, err = c.Missing(ctx, ds)
					if random.IntN(4) == 0 {
						p.cut()
					}
				}
				// Being cancelled or cut off is all that may happen.
				if err != nil && !errors.Is(err, errStop) && !errors.Is(err, cas.ErrUnavailable) && !errors.Is(err, cas.ErrNotFound) {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	clients.Wait()
	eventually(t, "no fetches", func() bool { flights, _ := s.Flights(); return flights == 0 })
	eventually(t, "no more goroutines than before", func() bool { return goroutines() <= before })
	eventually(t, "no calls at the upstream", func() bool { return f.calls(t) == 0 })
}
