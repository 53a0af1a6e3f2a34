package integration_test

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// A wire is a TCP address in front of another one, between two parts of a farm. It can become a black
// hole: what is sent into it then is swallowed, as are connections and their ends, without a word to
// either side. Connections that have lost something are reset when the hole is closed.
type wire struct {
	listener net.Listener
	target   string
	running  sync.WaitGroup

	mu     sync.Mutex // guards what follows
	hole   bool
	closed bool
	ends   map[net.Conn]*circuit
}

// A circuit is a connection through a wire.
type circuit struct {
	lost bool // guarded by the wire's mu: bytes or an end were swallowed
}

func startWire(t testing.TB, target string) *wire {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed when the test ends
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{listener: listener, target: target, ends: map[net.Conn]*circuit{}}
	w.running.Go(w.accept)
	t.Cleanup(w.close)
	return w
}

func (w *wire) addr() string { return w.listener.Addr().String() }

func (w *wire) accept() {
	for {
		from, err := w.listener.Accept()
		if err != nil {
			return
		}
		c := &circuit{}
		if !w.add(c, from) {
			continue
		}
		to, err := net.Dial("tcp", w.target) //nolint:noctx // loopback answers at once
		if err != nil {
			w.end(c, from)
			continue
		}
		if !w.add(c, to) {
			w.end(c, from)
			continue
		}
		w.running.Go(func() { w.relay(c, to, from) })
		w.running.Go(func() { w.relay(c, from, to) })
	}
}

// relay copies until one side ends, and then ends both, unless nobody may notice.
func (w *wire) relay(c *circuit, to, from net.Conn) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		switch {
		case w.swallows(c) && err == nil:
			continue
		case w.swallows(c):
			return
		}
		if n > 0 {
			if _, failed := to.Write(buffer[:n]); failed != nil {
				err = failed
			}
		}
		if err != nil {
			w.end(c, from, to)
			return
		}
	}
}

// swallows tells whether nothing of a circuit comes through any more; what asks is then lost.
func (w *wire) swallows(c *circuit) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.lost = c.lost || w.hole
	return c.lost && !w.closed
}

func (w *wire) add(c *circuit, conn net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		_ = conn.Close()
		return false
	}
	w.ends[conn] = c
	return true
}

func (w *wire) end(c *circuit, conns ...net.Conn) {
	if w.swallows(c) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, conn := range conns {
		_ = conn.Close()
		delete(w.ends, conn)
	}
}

// swallow opens the hole.
func (w *wire) swallow() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hole = true
}

// heal closes the hole and resets what has lost something in it. It returns how many connections that were.
func (w *wire) heal() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hole = false
	reset := w.losses()
	for conn, c := range w.ends {
		if c.lost {
			_ = conn.Close()
			delete(w.ends, conn)
		}
	}
	return reset
}

func (w *wire) close() {
	_ = w.listener.Close()
	w.mu.Lock()
	w.closed = true
	for conn := range w.ends {
		_ = conn.Close()
	}
	w.mu.Unlock()
	w.running.Wait()
}

// Through a hole comes nothing, neither bytes nor ends; what lost something is reset after it, and new
// connections work.
func TestWireSwallows(t *testing.T) {
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var servers sync.WaitGroup
	arrived := make(chan []byte, 10)
	servers.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				close(arrived)
				return
			}
			data, _ := io.ReadAll(conn) //nolint:errcheck // what was read is the point
			arrived <- data
			_ = conn.Close()
		}
	})
	defer servers.Wait()
	defer listener.Close()
	w := startWire(t, listener.Addr().String())
	send := func(texts ...string) net.Conn {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", w.addr())
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range texts {
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
		}
		return conn
	}
	lost := send()
	await(t, time.Minute, "connection through the wire", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.ends) == 2
	})
	w.swallow()
	if _, err := io.WriteString(lost, "lost"); err != nil {
		t.Fatal(err)
	}
	await(t, time.Minute, "loss", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.losses() == 1
	})
	if n := w.heal(); n != 1 {
		t.Errorf("%d connections have lost something, want 1", n)
	}
	if _, err := lost.Read(make([]byte, 1)); err == nil {
		t.Error("the connection that lost something goes on")
	}
	if data := <-arrived; len(data) != 0 {
		t.Errorf("%q came through the hole", data)
	}
	if err := send("kept").Close(); err != nil {
		t.Fatal(err)
	}
	if data := <-arrived; string(data) != "kept" {
		t.Errorf("%q came after the hole", data)
	}
}

// losses counts the circuits that have lost something. The caller holds mu.
func (w *wire) losses() int {
	lost := map[*circuit]bool{}
	for _, c := range w.ends {
		if c.lost {
			lost[c] = true
		}
	}
	return len(lost)
}
