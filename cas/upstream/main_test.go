package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cas/upstream"
	"github.com/jetfarm/jetfarm/frontend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var space = must(digest.SpaceOf("", repb.DigestFunction_SHA256, ""))

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// quiet is for tests in which something goes wrong.
func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// storage is the stores of a farm on a broker of its own.
type storage struct {
	broker  *brokertest.Farm
	blobs   *objectstore.Store
	actions *actioncache.Cache
}

func newStorage(t testing.TB) *storage {
	t.Helper()
	s := &storage{broker: brokertest.Start(t)}
	small := s.broker.Connect(t)
	s.blobs = must(objectstore.Open(t.Context(), objectstore.Config{Small: small, Bulk: s.broker.Connect(t), Log: quiet()}))
	s.actions = must(actioncache.Open(t.Context(), actioncache.Config{Conn: small, Blobs: s.blobs, Log: quiet()}))
	return s
}

// farm is another jetfarm, reached over gRPC.
type farm struct {
	*storage
	store   cas.Store // what its frontend serves
	server  *frontend.Server
	metrics *prometheus.Registry
	address string
}

func startFarm(t testing.TB, changes ...func(*frontend.Config)) *farm {
	t.Helper()
	return startSecure(t, nil, changes...)
}

// startSecure is startFarm behind TLS.
func startSecure(t testing.TB, secure credentials.TransportCredentials, changes ...func(*frontend.Config)) *farm {
	t.Helper()
	f := &farm{storage: newStorage(t), metrics: prometheus.NewRegistry()}
	cfg := frontend.Config{
		Blobs: f.blobs, Actions: f.actions, Broker: f.broker.Client(t), Log: quiet(), Registerer: f.metrics,
		AllowActionCacheUpdates: true,
	}
	for _, change := range changes {
		change(&cfg)
	}
	f.store = cfg.Blobs
	f.server = frontend.New(cfg)
	f.address = serve(t, f.server.GRPC(), func() {
		if err := f.server.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	}, secure)
	return f
}

// serve serves until the test's end.
func serve(t testing.TB, server *grpc.Server, stop func(), secure credentials.TransportCredentials) string {
	t.Helper()
	listener := must(new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0"))
	address := listener.Addr().String()
	if secure != nil {
		listener = secureListener{listener, secure}
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("Serve: %v", err)
		}
	})
	return address
}

// secureListener makes TLS connections of what it accepts.
type secureListener struct {
	net.Listener
	credentials credentials.TransportCredentials
}

func (l secureListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		secured, _, err := l.credentials.ServerHandshake(conn)
		if err == nil {
			return secured, nil
		}
		conn.Close()
	}
}

// connect returns a client of an address with bounds for tests.
func connect(t testing.TB, address string, changes ...func(*upstream.Config)) *upstream.Client {
	t.Helper()
	cfg := upstream.Config{
		Endpoint: upstream.Endpoint{Address: address}, Stall: time.Minute, Probe: 10 * time.Millisecond, Log: quiet(),
		Registerer: prometheus.NewRegistry(),
	}
	for _, change := range changes {
		change(&cfg)
	}
	c, err := upstream.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

// run runs until the test's end, or until stop is called.
func run(t testing.TB, service func(context.Context) error) (stop func()) {
	t.Helper()
	var group errgroup.Group
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	group.Go(func() error { return service(ctx) })
	stop = func() {
		cancel(nil)
		if err := group.Wait(); err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// tier returns a running tier on a store.
func tier(t testing.TB, local cas.Store, client *upstream.Client) *upstream.Tier {
	t.Helper()
	s := upstream.New(local, client)
	run(t, s.Run)
	return s
}

func random(n int) []byte {
	_, b := castest.Blob(space, n)
	return b
}

// add stores new random bytes.
func add(t testing.TB, s cas.Store, n int) (digest.Digest, []byte) {
	t.Helper()
	data := random(n)
	return put(t, s, data), data
}

func put(t testing.TB, s cas.Store, data []byte) digest.Digest {
	t.Helper()
	d := space.Of(data)
	if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatalf("Put of %d bytes: %v", len(data), err)
	}
	return d
}

// read returns a blob, or the error of opening or reading it.
func read(ctx context.Context, s cas.Store, d digest.Digest) ([]byte, error) {
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(r)
	return data, errors.Join(err, r.Close())
}

func wantBlob(t testing.TB, s cas.Store, d digest.Digest, data []byte) {
	t.Helper()
	got, err := read(t.Context(), s, d)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("reading %v: %d bytes of %d, error %v", d, len(got), len(data), err)
	}
}

func wantError(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("%s: error %v, want %v", what, err, want)
	}
}

// has tells whether a store has a blob.
func has(t testing.TB, s cas.Store, d digest.Digest) bool {
	t.Helper()
	missing, err := cas.Confirm(t.Context(), s, []digest.Digest{d})
	if err != nil {
		t.Fatalf("Confirm: %v", err)
	}
	return len(missing) == 0
}

// eventually calls f until it is true.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	bound := time.NewTimer(20 * time.Second)
	defer bound.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-bound.C:
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// values returns the sums of the metrics by name, and by name and labels.
func values(t testing.TB, registry prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sums := make(map[string]float64)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			value := m.GetCounter().GetValue() + m.GetGauge().GetValue()
			name := family.GetName()
			sums[name] += value
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			if len(labels) > 0 {
				sums[name+" "+strings.Join(labels, " ")] += value
			}
		}
	}
	return sums
}

// calls returns how many calls a farm is serving.
func (f *farm) calls(t testing.TB) float64 {
	t.Helper()
	return values(t, f.metrics)["jetfarm_frontend_rpc_in_flight_calls"]
}

func TestClientConformance(t *testing.T) {
	castest.Run(t, func(t testing.TB) cas.Store {
		t.Helper()
		return connect(t, startFarm(t).address)
	})
}

func TestTierConformance(t *testing.T) {
	t.Run("two farms", func(t *testing.T) {
		castest.Run(t, func(t testing.TB) cas.Store {
			t.Helper()
			return tier(t, newStorage(t).blobs, connect(t, startFarm(t).address))
		})
	})
	t.Run("upstream is down", func(t *testing.T) {
		castest.Run(t, func(t testing.TB) cas.Store {
			t.Helper()
			return tier(t, castest.NewMemory(), connect(t, "127.0.0.1:1"))
		})
	})
	t.Run("instance", func(t *testing.T) {
		castest.Run(t, func(t testing.TB) cas.Store {
			t.Helper()
			return tier(t, castest.NewMemory(), connect(t, startFarm(t).address, func(cfg *upstream.Config) { cfg.Endpoint.Instance = "back/up" }))
		})
	})
}

// What a store may have besides, the tier has as well.
func TestTierOptionalConformance(t *testing.T) {
	castest.RunResumer(t, func(t testing.TB) cas.Store {
		t.Helper()
		return tier(t, castest.NewResumable(), connect(t, startFarm(t).address))
	})
	castest.RunFrames(t, func(t testing.TB) cas.Store {
		t.Helper()
		return tier(t, newStorage(t).blobs, connect(t, startFarm(t).address))
	})
}
