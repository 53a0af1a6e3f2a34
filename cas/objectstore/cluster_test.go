package objectstore_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// startServer runs a broker with options of its own.
func startServer(t testing.TB, change func(*server.Options)) *server.Server {
	t.Helper()
	s := launchServer(t, change)
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("the server is not ready")
	}
	return s
}

// launchServer is startServer without waiting.
func launchServer(t testing.TB, change func(*server.Options)) *server.Server {
	t.Helper()
	opts := &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true,
	}
	change(opts)
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	return s
}

func connect(t testing.TB, s *server.Server) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// A broker that lets almost nothing wait refuses writes all the time, and all of them succeed.
func TestPutWaitsWhileBusy(t *testing.T) {
	s := startServer(t, func(o *server.Options) { o.StreamMaxBufferedMsgs = 8 })
	store := open(t, objectstore.Config{Small: connect(t, s), Bulk: connect(t, s), Log: quiet()})
	var writers sync.WaitGroup
	for range 16 {
		writers.Go(func() {
			for range 20 {
				d, data := castest.Blob(castest.Space(t, ""), 100)
				if err := store.Put(t.Context(), d, bytes.NewReader(data)); err != nil && !errors.Is(err, cas.ErrUnavailable) {
					t.Errorf("Put: %v", err)
				} else if err != nil {
					t.Logf("gave up: %v", err)
					continue
				}
				if got, err := cas.ReadAll(t.Context(), store, d, d.Size()); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, error %v", len(got), err)
				}
			}
		})
	}
	writers.Wait()
	// Metadata that was refused is not sent again: it is for stock clients alone.
	if got := streamState(t, connect(t, s), smallStream).Msgs; got <= 16*20 || got > 2*16*20 {
		t.Errorf("%d messages, want at most %d pairs of chunk and metadata", got, 16*20)
	}
}

// startCluster runs three brokers that replicate to each other.
func startCluster(t testing.TB) []*server.Server {
	t.Helper()
	var routes []*url.URL
	for range 3 {
		listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed at once
		if err != nil {
			t.Fatal(err)
		}
		routes = append(routes, &url.URL{Scheme: "nats", Host: listener.Addr().String()})
		listener.Close()
	}
	var servers []*server.Server
	for i, route := range routes {
		port, err := strconv.Atoi(route.Port())
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, launchServer(t, func(o *server.Options) {
			o.ServerName = fmt.Sprintf("node%d", i)
			o.Cluster = server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: port}
			o.Routes = routes
		}))
	}
	for _, s := range servers {
		if !s.ReadyForConnections(20 * time.Second) {
			t.Fatal("the cluster is not ready")
		}
	}
	return servers
}

// A read right after a write may ask a replica that lags behind.
func TestReplicatedReadsAfterWrites(t *testing.T) {
	servers := startCluster(t)
	config := func(s *server.Server) objectstore.Config {
		return objectstore.Config{Small: connect(t, s), Bulk: connect(t, s), Replicas: 3, Log: logger(t)}
	}
	var writer *objectstore.Store
	eventually(t, "the cluster has a leader", func() bool {
		s, err := objectstore.Open(t.Context(), config(servers[0]))
		writer = s
		return err == nil
	})
	readers := []cas.Store{open(t, config(servers[1])), open(t, config(servers[2])), writer}
	var clients sync.WaitGroup
	for _, size := range []int{100, 1 << 10, 512<<10 + 1, 512<<10 + 1, 520 << 10, 3 << 20} {
		clients.Go(func() {
			for range 12 {
				d, data := castest.Blob(castest.Space(t, ""), size)
				if err := writer.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
					t.Errorf("Put: %v", err)
					return
				}
				for _, s := range readers {
					if got, err := cas.ReadAll(t.Context(), s, d, d.Size()); err != nil || !bytes.Equal(got, data) {
						t.Errorf("%d of %d bytes right after the Put, error %v", len(got), size, err)
					}
				}
			}
		})
	}
	clients.Wait()

	d, data := castest.Blob(castest.Space(t, ""), 4<<20)
	var writers sync.WaitGroup
	for _, s := range append(readers, readers...) {
		writers.Go(func() {
			if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Errorf("Put: %v", err)
			}
		})
	}
	writers.Wait()
	if got, err := cas.ReadAll(t.Context(), writer, d, d.Size()); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, error %v", len(got), err)
	}
}
