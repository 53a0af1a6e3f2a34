package brokertest

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
)

// Farm is a broker that a test owns.
type Farm struct {
	Server *broker.Server
	config broker.ServerConfig
	log    *slog.Logger
	js     jetstream.JetStream
}

// Start starts a server that also listens on a loopback port.
func Start(t testing.TB) *Farm {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	f := &Farm{log: log, config: broker.ServerConfig{Dir: t.TempDir(), Listen: "127.0.0.1:0", Log: log}}
	f.start(t)
	t.Cleanup(func() { f.Server.Stop() })
	return f
}

func (f *Farm) start(t testing.TB) {
	t.Helper()
	s, err := broker.StartServer(t.Context(), f.config)
	if err != nil {
		t.Fatalf("StartServer: %v", err)
	}
	f.Server = s
	f.config.Listen = strings.TrimPrefix(s.URL(), "nats://")
}

// URL is where other processes and real TCP connections reach the server.
func (f *Farm) URL() string { return f.Server.URL() }

// Log is where the farm's parts of this test log to.
func (f *Farm) Log() *slog.Logger { return f.log }

// Streams returns the names of the streams that there are.
func (f *Farm) Streams(t testing.TB) []string {
	t.Helper()
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	lister := js.StreamNames(t.Context())
	for name := range lister.Name() {
		names = append(names, name)
	}
	if err := lister.Err(); err != nil {
		t.Fatal(err)
	}
	return names
}

// Restart stops the server and starts it again on its files and its port.
func (f *Farm) Restart(t testing.TB) {
	t.Helper()
	f.Server.Stop()
	f.start(t)
}

// Purge removes every message of a stream.
func (f *Farm) Purge(t testing.TB, stream string) {
	t.Helper()
	f.info(t, stream)
	s, err := f.js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatalf("stream %s: %v", stream, err)
	}
	if err := s.Purge(t.Context()); err != nil {
		t.Fatalf("purge %s: %v", stream, err)
	}
}

// Connect returns a connection over loopback TCP that is closed at the test's end.
func (f *Farm) Connect(t testing.TB) *nats.Conn {
	t.Helper()
	return f.connect(t, f.URL())
}

func (f *Farm) connect(t testing.TB, url string) *nats.Conn {
	t.Helper()
	nc, err := broker.Connect(t.Context(), broker.ConnectConfig{Servers: []string{url}, Name: t.Name(), Log: f.log})
	if err != nil {
		t.Fatalf("Connect: %v", err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// Client returns a client that is open and runs until the test's end.
func (f *Farm) Client(t testing.TB) *broker.Client {
	t.Helper()
	return f.ClientWith(t, broker.Config{})
}

// ClientWith is Client with a configuration, of which it sets Conn and Log.
func (f *Farm) ClientWith(t testing.TB, cfg broker.Config) *broker.Client {
	t.Helper()
	return f.ClientAt(t, f.URL(), cfg)
}

// ClientAt is ClientWith through another address of the server, such as a proxy's.
func (f *Farm) ClientAt(t testing.TB, url string, cfg broker.Config) *broker.Client {
	t.Helper()
	cfg.Conn, cfg.Log, cfg.Submits = f.connect(t, url), f.log, true
	c, err := broker.New(cfg)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	if err := c.Open(t.Context()); err != nil {
		t.Fatalf("Open: %v", err)
	}
	var group errgroup.Group
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	group.Go(func() error { return c.Run(ctx) })
	t.Cleanup(func() {
		cancel(nil)
		if err := group.Wait(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return c
}

// Queue returns a worker's queue on a client, which runs until the test's end.
func Queue(t testing.TB, c *broker.Client, self broker.WorkerInfo) *broker.Queue {
	t.Helper()
	q := c.Queue(self)
	var group errgroup.Group
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	group.Go(func() error { return q.Run(ctx) })
	t.Cleanup(func() {
		cancel(nil)
		if err := group.Wait(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return q
}

// Messages returns how many messages a stream holds.
func (f *Farm) Messages(t testing.TB, stream string) uint64 {
	t.Helper()
	return f.info(t, stream).State.Msgs
}

// Consumers returns how many consumers a stream has.
func (f *Farm) Consumers(t testing.TB, stream string) int {
	t.Helper()
	return f.info(t, stream).State.Consumers
}

func (f *Farm) info(t testing.TB, stream string) *jetstream.StreamInfo {
	t.Helper()
	if f.js == nil {
		js, err := jetstream.New(f.Connect(t))
		if err != nil {
			t.Fatalf("jetstream: %v", err)
		}
		f.js = js
	}
	s, err := f.js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatalf("stream %s: %v", stream, err)
	}
	return s.CachedInfo()
}

// Subscriptions returns how many subscriptions the server has on subjects with a prefix.
func (f *Farm) Subscriptions(t testing.TB, prefix string) int {
	t.Helper()
	return f.Server.Subscriptions(prefix)
}

// All returns the messages of a stream, oldest first.
func (f *Farm) All(t testing.TB, stream string) []*jetstream.RawStreamMsg {
	t.Helper()
	state := f.info(t, stream).State
	s, err := f.js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatalf("stream %s: %v", stream, err)
	}
	var all []*jetstream.RawStreamMsg
	for sequence := state.FirstSeq; sequence <= state.LastSeq && state.Msgs > 0; sequence++ {
		msg, err := s.GetMsg(t.Context(), sequence)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			t.Fatalf("message %d of %s: %v", sequence, stream, err)
		}
		all = append(all, msg)
	}
	return all
}
