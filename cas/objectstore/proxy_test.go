package objectstore_test

import (
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// proxy is a TCP proxy before a broker whose network a test can break.
type proxy struct {
	listener net.Listener
	target   string
	// silent makes the proxy keep connections open and pass nothing on.
	silent atomic.Bool
	// refusing makes it close new connections at once.
	refusing atomic.Bool
	// delay is a pause in nanoseconds before every 64 KiB from the broker.
	delay atomic.Int64
	done  chan struct{}

	mu    sync.Mutex
	conns []net.Conn // guarded by mu
}

func newProxy(t testing.TB, f *brokertest.Farm) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed when the test ends
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, target: strings.TrimPrefix(f.URL(), "nats://"), done: make(chan struct{})}
	var running sync.WaitGroup
	running.Go(func() { p.accept(&running) })
	t.Cleanup(func() {
		close(p.done)
		listener.Close()
		p.cut()
		running.Wait()
	})
	return p
}

// connect returns a connection through the proxy that notices a silent peer only by its requests.
func (p *proxy) connect(t testing.TB) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect("nats://"+p.listener.Addr().String(),
		nats.PingInterval(time.Hour), nats.FlusherTimeout(time.Second), nats.Timeout(time.Second),
		nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 0), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func (p *proxy) accept(running *sync.WaitGroup) {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target) //nolint:noctx // loopback answers at once
		if err != nil || p.refusing.Load() {
			client.Close()
			if err == nil {
				server.Close()
			}
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, client, server)
		p.mu.Unlock()
		running.Go(func() { p.pass(server, client, false) })
		running.Go(func() { p.pass(client, server, true) })
	}
}

func (p *proxy) pass(to, from net.Conn, slow bool) {
	defer to.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if delay := p.delay.Load(); slow && delay > 0 {
			timer := time.NewTimer(time.Duration(delay))
			select {
			case <-timer.C:
			case <-p.done:
				timer.Stop()
			}
		}
		if p.silent.Load() {
			n = 0
		}
		if _, errTo := to.Write(buffer[:n]); err != nil || errTo != nil {
			return
		}
	}
}

// cut breaks all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}
