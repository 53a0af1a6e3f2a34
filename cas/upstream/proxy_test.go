package upstream_test

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// proxy is a TCP proxy before an upstream whose network a test can break.
type proxy struct {
	listener net.Listener
	target   string
	// silent makes the proxy keep connections open and pass nothing on.
	silent atomic.Bool
	// refusing makes it close new connections at once.
	refusing atomic.Bool
	// delay is a pause in nanoseconds for every 32 KiB in both directions.
	delay atomic.Int64
	// cutAfter is how many bytes come from the upstream before all connections break, once; 0 is never.
	cutAfter atomic.Int64
	// silentAfter is how many bytes pass in either direction before the proxy is silent; 0 is never.
	silentAfter atomic.Int64
	done        chan struct{}

	mu    sync.Mutex
	conns []net.Conn // guarded by mu
}

func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	listener := must(new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0"))
	p := &proxy{listener: listener, target: target, done: make(chan struct{})}
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

func (p *proxy) address() string { return p.listener.Addr().String() }

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

func (p *proxy) pass(to, from net.Conn, down bool) {
	defer to.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if delay := p.delay.Load(); delay > 0 {
			timer := time.NewTimer(time.Duration(delay))
			select {
			case <-timer.C:
			case <-p.done:
				timer.Stop()
			}
		}
		if left := p.silentAfter.Load(); left > 0 && p.silentAfter.Add(-int64(n)) <= 0 {
			p.silent.Store(true)
		}
		if left := p.cutAfter.Load(); down && left > 0 && p.cutAfter.Add(-int64(n)) <= 0 {
			p.cutAfter.Store(0)
			p.cut()
			return
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
