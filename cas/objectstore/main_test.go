package objectstore_test

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

func TestMain(m *testing.M) {
	if url := os.Getenv(uploadEnv); url != "" {
		if err := upload(url); err != nil {
			panic(err)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// config is that of a store on the farm whose small and large blobs travel apart.
func config(t testing.TB, f *brokertest.Farm) objectstore.Config {
	t.Helper()
	return objectstore.Config{Small: f.Connect(t), Bulk: f.Connect(t), Log: logger(t)}
}

// logger shows what goes wrong, since nothing should in most tests.
func logger(t testing.TB) *slog.Logger {
	t.Helper()
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// quiet is for tests in which something goes wrong.
func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t testing.TB, cfg objectstore.Config) *objectstore.Store {
	t.Helper()
	s, err := objectstore.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return s
}

// running opens a store whose Run goes on until the test's end.
func running(t testing.TB, cfg objectstore.Config) *objectstore.Store {
	t.Helper()
	registry := prometheus.NewRegistry()
	if cfg.Registerer == nil {
		cfg.Registerer = registry
	}
	s := open(t, cfg)
	run(t, s)
	if cfg.Registerer == registry {
		listening(t, registry)
	}
	return s
}

// listening returns when Run hears announcements: it has listed the streams after it subscribed.
func listening(t testing.TB, registry *prometheus.Registry) {
	t.Helper()
	eventually(t, "the listing at the start of Run", func() bool { return values(t, registry)["jetfarm_cas_index_repairs_total"] == 1 })
}

func run(t testing.TB, s *objectstore.Store) {
	t.Helper()
	var group errgroup.Group
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	group.Go(func() error { return s.Run(ctx) })
	t.Cleanup(func() {
		cancel(nil)
		if err := group.Wait(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestConformance(t *testing.T) {
	castest.Run(t, func(t testing.TB) cas.Store {
		t.Helper()
		return running(t, config(t, brokertest.Start(t)))
	})
}

// One connection for everything must do as well.
func TestConformanceWithoutRun(t *testing.T) {
	castest.Run(t, func(t testing.TB) cas.Store {
		t.Helper()
		nc := brokertest.Start(t).Connect(t)
		return open(t, objectstore.Config{Small: nc, Bulk: nc, Log: logger(t)})
	})
}

// streamState is what the broker holds for a bucket.
func streamState(t testing.TB, nc *nats.Conn, stream string) jetstream.StreamState {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatalf("stream %s: %v", stream, err)
	}
	return s.CachedInfo().State
}

// eventually calls f until it is true.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	bound := time.NewTimer(time.Minute)
	defer bound.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-bound.C:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// wantNothing checks that streams are empty.
func wantNothing(t testing.TB, nc *nats.Conn, streams ...string) {
	t.Helper()
	for _, stream := range streams {
		if state := streamState(t, nc, stream); state.Msgs != 0 || state.Bytes != 0 {
			t.Errorf("%s holds %d messages, %d bytes, want none", stream, state.Msgs, state.Bytes)
		}
	}
}
