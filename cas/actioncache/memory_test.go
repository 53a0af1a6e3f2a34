package actioncache_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// remember makes the caches of a test keep what they have read.
func remember(cfg *actioncache.Config) {
	cfg.MemoryBytes, cfg.MemoryAge = 8<<20, time.Hour
}

// run runs the cache until the test's end and returns when its memory lives.
func run(t testing.TB, c *actioncache.Cache) {
	t.Helper()
	var group errgroup.Group
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	group.Go(func() error { return c.Run(ctx) })
	t.Cleanup(func() {
		cancel(nil)
		if err := group.Wait(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	eventually(t, c.Live)
}

// eventually waits for what other goroutines do.
func eventually(t testing.TB, what func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !what() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal(context.Cause(t.Context()))
		}
	}
}

// other opens the same bucket and blobs from another connection, as another process does.
func (x *fixture) other(t testing.TB, farm *brokertest.Farm) *fixture {
	t.Helper()
	y := &fixture{memory: x.memory, store: x.store, space: x.space, nc: farm.Connect(t)}
	cfg := actioncache.Config{Conn: y.nc, Blobs: y.store, Log: slog.New(slog.DiscardHandler)}
	remember(&cfg)
	c, err := actioncache.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	y.Cache = c
	run(t, c)
	return y
}

// pair is two caches on one broker.
func pair(t testing.TB) (farm *brokertest.Farm, a, b *fixture) {
	t.Helper()
	farm = brokertest.Start(t)
	x := &fixture{memory: castest.NewMemory(), space: castest.Space(t, "ac/test")}
	x.store = &castest.Faulty{Store: x.memory}
	return farm, x.other(t, farm), x.other(t, farm)
}

func exit(code int) *repb.ActionResult { return &repb.ActionResult{ExitCode: int32(code)} }

// remembered returns when Get is answered from memory, with a result of this exit code.
func (x *fixture) remembered(t testing.TB, name string, code int) {
	t.Helper()
	eventually(t, func() bool {
		before := x.Hits()
		got, err := x.Get(t.Context(), action(x, name))
		return err == nil && got.GetExitCode() == int32(code) && x.Hits() > before
	})
}

// purge removes entries without a word to anybody.
func purge(t testing.TB, nc *nats.Conn) {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "KV_ac-1")
	if err == nil {
		err = s.Purge(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestIncompleteInMemory is row ACG-2 for what is in memory: the blobs are asked for each time, and an
// output directory is not read again.
func TestIncompleteInMemory(t *testing.T) {
	x := start(t, remember)
	run(t, x.Cache)
	result, blobs := x.full(t)
	x.put(t, action(x, "a"), result)
	purge(t, x.nc)
	for name, d := range blobs {
		data, err := cas.ReadAll(t.Context(), x.memory, d, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		x.memory.Remove(d)
		x.wantNone(t, action(x, "a"))
		x.memory.Corrupt(d, data)
		x.calls[0].Store(0)
		x.calls[2].Store(0)
		x.want(t, action(x, "a"), result)
		if opened, asked := x.calls[0].Load(), x.calls[2].Load(); opened != 0 || asked != 1 {
			t.Errorf("%s: %d blobs opened and %d questions, want 0 and 1", name, opened, asked)
		}
	}
}

// TestStorageFailsInMemory is row ACG-4 for what is in memory.
func TestStorageFailsInMemory(t *testing.T) {
	x := start(t, remember)
	run(t, x.Cache)
	result, _ := x.full(t)
	x.put(t, action(x, "a"), result)
	failed := errors.New("the storage fails")
	x.store.Plan = func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{After: -1, Err: failed} }
	if _, err := x.Get(t.Context(), action(x, "a")); !errors.Is(err, failed) || errors.Is(err, actioncache.ErrNotFound) {
		t.Errorf("error %v, want %v", err, failed)
	}
}

// TestOthersWrites is row ACU-9 across processes.
func TestOthersWrites(t *testing.T) {
	_, a, b := pair(t)
	for i := range 50 {
		a.put(t, action(a, "x"), exit(i))
		a.want(t, action(a, "x"), exit(i))
		b.remembered(t, "x", i)
		a, b = b, a
	}
}

// TestNeverBackwards: who has seen a result does not see an earlier one, whatever other processes
// write at the same time, and a writer sees its own at once.
func TestNeverBackwards(t *testing.T) {
	const writes, names, readers = 300, 4, 4
	_, a, b := pair(t)
	name := func(i int) string { return fmt.Sprint("action ", i%names) }
	for i := range names {
		a.put(t, action(a, name(i)), exit(0))
	}
	var done atomic.Bool
	var clients, writer errgroup.Group
	watch := func(x *fixture, i int) func() error {
		return func() error {
			pace := time.NewTicker(100 * time.Microsecond) // leaves the processors some time for the broker
			defer pace.Stop()
			for seen := int32(0); !done.Load(); <-pace.C {
				got, err := x.Get(t.Context(), action(x, name(i)))
				if err != nil {
					return err
				}
				if got.GetExitCode() < seen {
					return fmt.Errorf("%s: %d after %d", name(i), got.GetExitCode(), seen)
				}
				seen = got.GetExitCode()
			}
			return nil
		}
	}
	for i := range readers {
		clients.Go(watch(a, i))
		clients.Go(watch(b, i))
	}
	writer.Go(func() error {
		for i := range writes {
			from := []*fixture{a, b}[i/names%2]
			if err := from.Put(t.Context(), action(from, name(i)), exit(i+1)); err != nil {
				return err
			}
			got, err := from.Get(t.Context(), action(from, name(i)))
			if err != nil || got.GetExitCode() != int32(i+1) {
				return fmt.Errorf("read %v after writing %d: error %w", got.GetExitCode(), i+1, err)
			}
		}
		return nil
	})
	err := writer.Wait()
	done.Store(true)
	if err := errors.Join(err, clients.Wait()); err != nil {
		t.Error(err)
	}
}

// TestGaps: whatever news may have been lost, nothing from before is served after.
func TestGaps(t *testing.T) {
	gaps := map[string]func(t *testing.T, farm *brokertest.Farm, x *fixture){
		"the broker restarts": func(t *testing.T, farm *brokertest.Farm, _ *fixture) { farm.Restart(t) },
		"a sequence is left out": func(t *testing.T, _ *brokertest.Farm, x *fixture) {
			m := nats.NewMsg("jetfarm.ac.something")
			m.Header.Set(jetstream.SequenceHeader, "4711")
			if err := x.nc.PublishMsg(m); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, gap := range gaps {
		t.Run(name, func(t *testing.T) {
			farm, a, b := pair(t)
			b.put(t, action(a, "other"), exit(1)) // a knows a sequence
			a.put(t, action(a, "x"), exit(1))
			b.put(t, action(a, "other"), exit(2))
			a.remembered(t, "other", 2)
			purge(t, b.nc)
			a.want(t, action(a, "x"), exit(1)) // nobody has told it
			gap(t, farm, b)
			eventually(t, func() bool {
				_, err := a.Get(t.Context(), action(a, "x"))
				return errors.Is(err, actioncache.ErrNotFound)
			})
			eventually(t, a.Live)
			a.put(t, action(a, "x"), exit(2))
			a.remembered(t, "x", 2)
		})
	}
}

// TestAge bounds how long a change without news goes unseen.
func TestAge(t *testing.T) {
	x := start(t, remember, func(cfg *actioncache.Config) { cfg.MemoryAge = time.Nanosecond })
	run(t, x.Cache)
	x.put(t, action(x, "a"), exit(1))
	x.want(t, action(x, "a"), exit(1))
	purge(t, x.nc)
	x.wantNone(t, action(x, "a"))
}

// TestMemoryIsBounded: in bytes, the last used stay, and large results are not kept at all.
func TestMemoryIsBounded(t *testing.T) {
	x := start(t, func(cfg *actioncache.Config) { cfg.MemoryBytes, cfg.MemoryAge = 256<<10, time.Hour })
	run(t, x.Cache)
	result := &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: strings.Repeat("w", 10_000)}}
	for i := range 100 {
		x.put(t, action(x, fmt.Sprint(i)), result)
		x.want(t, action(x, "0"), result)
		if used := x.Used(); used > 256<<10 || used < 10_000 {
			t.Fatalf("%d bytes are used", used)
		}
	}
	purge(t, x.nc)
	x.want(t, action(x, "0"), result)
	x.want(t, action(x, "99"), result)
	x.wantNone(t, action(x, "1"))

	result.ExecutionMetadata.Worker = strings.Repeat("w", 20_000)
	x.put(t, action(x, "large"), result)
	hits := x.Hits()
	x.want(t, action(x, "large"), result)
	if x.Hits() != hits {
		t.Error("a large result is in memory")
	}
}

// TestMemoryOrder: answers, news and own writes in any order never bring an older value back.
func TestMemoryOrder(t *testing.T) {
	a := castest.Space(t, "").Of([]byte("a"))
	now := time.Now()
	want := func(t *testing.T, m actioncache.Memory, want string) {
		t.Helper()
		if got, _ := m.Get(a); got != want {
			t.Errorf("value %q, want %q", got, want)
		}
	}
	for name, test := range map[string]func(m actioncache.Memory, epoch uint64) string{
		"news of an own write":     func(m actioncache.Memory, e uint64) string { m.Add(a, 5, "5", e, now); m.Changed(a, 5); return "5" },
		"own write after its news": func(m actioncache.Memory, e uint64) string { m.Changed(a, 5); m.Add(a, 5, "5", e, now); return "5" },
		"a late answer":            func(m actioncache.Memory, e uint64) string { m.Changed(a, 5); m.Add(a, 4, "4", e, now); return "" },
		"a late answer after a write": func(m actioncache.Memory, e uint64) string {
			m.Add(a, 5, "5", e, now)
			m.Add(a, 4, "4", e, now)
			return "5"
		},
		"late news":            func(m actioncache.Memory, e uint64) string { m.Add(a, 5, "5", e, now); m.Changed(a, 4); return "5" },
		"news":                 func(m actioncache.Memory, e uint64) string { m.Add(a, 4, "4", e, now); m.Changed(a, 5); return "" },
		"an answer over a gap": func(m actioncache.Memory, e uint64) string { m.Gap(); m.Add(a, 5, "5", e, now); return "" },
		"an unsure write":      func(m actioncache.Memory, e uint64) string { m.Add(a, 5, "5", e, now); m.Doubt(a); return "" },
		"a late answer after doubt": func(m actioncache.Memory, e uint64) string {
			m.Add(a, 5, "5", e, now)
			m.Doubt(a)
			m.Add(a, 4, "4", e, now)
			return ""
		},
		"an old write after a gap hides an older answer": func(m actioncache.Memory, e uint64) string {
			m.Gap()
			_, next := m.Get(a)
			m.Add(a, 4, "4", next, now)
			m.Add(a, 5, "5", e, now)
			return ""
		},
		"an answer that took too long": func(m actioncache.Memory, e uint64) string {
			m.Add(a, 5, "5", e, now.Add(-time.Hour))
			return ""
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := actioncache.NewMemory(1<<20, time.Minute)
			_, epoch := m.Get(a)
			want(t, m, test(m, epoch))
		})
	}
	m := actioncache.NewMemory(1<<20, time.Minute)
	for range 2 {
		_, epoch := m.Get(a)
		m.Add(a, 1, "value", epoch, now)
		m.Doubt(a)
		m.Gap()
	}
	if used := m.Used(); used != 0 {
		t.Errorf("%d bytes are used after all was forgotten", used)
	}
}

// TestOldBucket: a bucket of an earlier version is brought to tell its changes, and keeps its bound.
func TestOldBucket(t *testing.T) {
	farm := brokertest.Start(t)
	js, err := jetstream.New(farm.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	_, err = js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "KV_ac-1", Subjects: []string{"$KV.ac-1.>"}, MaxMsgsPerSubject: 1, MaxBytes: 123 << 20, Discard: jetstream.DiscardOld,
		Duplicates: 100 * time.Millisecond, AllowRollup: true, AllowDirect: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	x := &fixture{memory: castest.NewMemory(), space: castest.Space(t, "ac/test")}
	x.store = &castest.Faulty{Store: x.memory}
	a, b := x.other(t, farm), x.other(t, farm)
	a.put(t, action(x, "x"), exit(1))
	b.remembered(t, "x", 1)
	a.put(t, action(x, "x"), exit(2))
	b.remembered(t, "x", 2)
	s, err := js.Stream(t.Context(), "KV_ac-1")
	if err != nil {
		t.Fatal(err)
	}
	if size := s.CachedInfo().Config.MaxBytes; size != 123<<20 {
		t.Errorf("the bound is now %d bytes", size)
	}
}
