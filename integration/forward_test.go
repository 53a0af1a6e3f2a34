package integration_test

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// A forwarder stands where a load balancer stands: a TCP address in front of several frontends,
// each connection to the first of them that accepts it.
type forwarder struct {
	listener net.Listener
	targets  []string
	open     sync.WaitGroup
	passed   atomic.Int64 // bytes, both ways
	mu       sync.Mutex   // guards what follows
	conns    map[net.Conn]bool
	closed   bool
	stalled  chan struct{} // closed when bytes pass again; nil while they do
}

func startForwarder(t *testing.T, targets ...string) *forwarder {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed when the test ends
	if err != nil {
		t.Fatal(err)
	}
	f := &forwarder{listener: listener, targets: targets, conns: map[net.Conn]bool{}}
	f.open.Go(f.accept)
	t.Cleanup(f.close)
	return f
}

func (f *forwarder) addr() string { return f.listener.Addr().String() }

func (f *forwarder) accept() {
	for {
		client, err := f.listener.Accept()
		if err != nil {
			return
		}
		f.open.Go(func() { f.forward(client) })
	}
}

func (f *forwarder) forward(client net.Conn) {
	defer client.Close()
	for _, target := range f.targets {
		server, err := net.Dial("tcp", target) //nolint:noctx // loopback answers at once
		if err != nil {
			continue
		}
		defer server.Close()
		if !f.track(client, server) {
			return
		}
		defer f.untrack(client, server)
		var copies sync.WaitGroup
		copies.Go(func() { f.relay(server, client) })
		copies.Go(func() { f.relay(client, server) })
		copies.Wait()
		return
	}
}

// relay copies until one side ends and then ends both: gRPC never half-closes a connection.
func (f *forwarder) relay(to, from net.Conn) {
	_, _ = io.Copy(to, &gated{from, f}) //nolint:errcheck // a connection that breaks is what these tests are about
	_ = to.Close()
	_ = from.Close()
}

// gated is a connection of which nothing is read while the forwarder stalls.
type gated struct {
	io.Reader
	forwarder *forwarder
}

func (g *gated) Read(p []byte) (int, error) {
	n, err := g.Reader.Read(p)
	g.forwarder.passed.Add(int64(n))
	g.forwarder.mu.Lock()
	stalled := g.forwarder.stalled
	g.forwarder.mu.Unlock()
	if stalled != nil {
		<-stalled
	}
	return n, err
}

// stall makes all connections pass nothing, or go on.
func (f *forwarder) stall(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stalled != nil {
		close(f.stalled)
		f.stalled = nil
	}
	if on && !f.closed {
		f.stalled = make(chan struct{})
	}
}

// cut breaks all connections that there are.
func (f *forwarder) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		_ = c.Close()
	}
}

func (f *forwarder) track(conns ...net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range conns {
		f.conns[c] = true
	}
	return !f.closed
}

func (f *forwarder) untrack(conns ...net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range conns {
		delete(f.conns, c)
	}
}

func (f *forwarder) close() {
	_ = f.listener.Close()
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.stall(false)
	f.cut()
	f.open.Wait()
}
