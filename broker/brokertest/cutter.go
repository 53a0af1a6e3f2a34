package brokertest

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
)

// Cutter stands between one process and the server, and ends the process, as far as the server and all
// others can see, at a message that the process sends: all its connections are cut and no new one is let
// through. That is what a death between two steps looks like. Or it only cuts them, once, as a network does.
type Cutter struct {
	listener net.Listener
	to       string
	group    errgroup.Group

	mu      sync.Mutex
	conns   []net.Conn                // guarded by mu
	at      func(subject string) bool // guarded by mu; nil before Arm
	forward bool                      // guarded by mu; whether the message still arrives
	clients []*nats.Conn              // guarded by mu; of the process
	lost    string                    // guarded by mu; the prefix of the subjects of messages that get lost, or ""
	again   bool                      // guarded by mu; whether the process may connect again
	hit     chan struct{}             // closed at the message
	cut     chan struct{}             // closed when the process is dead

	muted   atomic.Bool   // whether the process hears nothing any more
	arrived chan struct{} // gets one when the server has answered since then
}

// Cutter returns one that lets all through until it is armed.
func (f *Farm) Cutter(t testing.TB) *Cutter {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &Cutter{listener: l, to: strings.TrimPrefix(f.URL(), "nats://"), hit: make(chan struct{}), cut: make(chan struct{}), arrived: make(chan struct{}, 1)}
	c.group.Go(c.accept)
	t.Cleanup(func() {
		c.end()
		if err := errors.Join(l.Close(), c.group.Wait()); err != nil {
			t.Error(err)
		}
	})
	return c
}

// URL is where the process finds the server.
func (c *Cutter) URL() string { return "nats://" + c.listener.Addr().String() }

// Arm cuts at the next message to a subject that begins with prefix: before it arrives or, with after, when it
// has arrived and nothing has come back.
func (c *Cutter) Arm(prefix string, after bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.forward = func(subject string) bool { return strings.HasPrefix(subject, prefix) }, after
}

// Lose makes every message of the process get lost whose subject begins with prefix.
func (c *Cutter) Lose(prefix string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lost = prefix
}

// Survive makes the process live on after the cut: it may connect again.
func (c *Cutter) Survive() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.again = true
}

// Cut is closed when the connections are cut.
func (c *Cutter) Cut() <-chan struct{} { return c.hit }

// sever cuts the connections at the message.
func (c *Cutter) sever() {
	c.mu.Lock()
	again := c.again
	if again {
		for _, conn := range c.conns {
			conn.Close() //nolint:errcheck // it is cut either way
		}
		c.conns, c.at = nil, nil
		c.muted.Store(false) // what was muted is closed
	}
	c.mu.Unlock()
	if !again {
		c.end()
	}
	close(c.hit)
}

func (c *Cutter) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.cut:
		return
	default:
	}
	close(c.cut)
	for _, conn := range c.conns {
		conn.Close() //nolint:errcheck // it is cut either way
	}
	for _, nc := range c.clients {
		c.group.Go(func() error { nc.Close(); return nil }) // a dead process tries nothing again
	}
}

// Connect returns a connection of the process.
func (c *Cutter) Connect(t testing.TB, f *Farm) *nats.Conn {
	t.Helper()
	nc := f.connect(t, c.URL())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clients = append(c.clients, nc)
	return nc
}

// Client returns a client of the process, which is open.
func (c *Cutter) Client(t testing.TB, f *Farm, cfg broker.Config) *broker.Client {
	t.Helper()
	return f.open(t, c.Connect(t, f), cfg)
}

func (c *Cutter) dead() bool {
	select {
	case <-c.cut:
		return true
	default:
		return false
	}
}

func (c *Cutter) accept() error {
	for {
		in, err := c.listener.Accept()
		if err != nil {
			return nil //nolint:nilerr // closed
		}
		out, err := new(net.Dialer).Dial("tcp", c.to)
		c.mu.Lock()
		if err != nil || c.dead() {
			c.mu.Unlock()
			in.Close() //nolint:errcheck // it is cut either way
			if out != nil {
				out.Close() //nolint:errcheck // it is cut either way
			}
			continue
		}
		c.conns = append(c.conns, in, out)
		c.mu.Unlock()
		c.group.Go(func() error { c.send(in, out); return nil })
		c.group.Go(func() error { c.answer(out, in); return nil })
	}
}

// answer copies what the server says, until the process is muted.
func (c *Cutter) answer(from, to net.Conn) {
	defer to.Close() //nolint:errcheck // it ends either way
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		if c.muted.Load() {
			if bytes.Contains(buffer[:n], []byte("PONG")) {
				select {
				case c.arrived <- struct{}{}:
				default:
				}
			}
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// send copies what the process says, message by message.
func (c *Cutter) send(from, to net.Conn) {
	defer to.Close() //nolint:errcheck // it ends either way
	r := bufio.NewReaderSize(from, 64<<10)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		payload := []byte(nil)
		fields := strings.Fields(line)
		publishes := len(fields) >= 3 && (fields[0] == "PUB" || fields[0] == "HPUB")
		if publishes {
			size, err := strconv.Atoi(fields[len(fields)-1])
			if err != nil {
				return
			}
			payload = make([]byte, size+2)
			if _, err := io.ReadFull(r, payload); err != nil {
				return
			}
		}
		c.mu.Lock()
		hit := publishes && c.at != nil && c.at(fields[1])
		forward := !hit || c.forward
		lost := publishes && c.lost != "" && strings.HasPrefix(fields[1], c.lost)
		if hit {
			c.at = nil // another connection must not be hit as well
		}
		c.mu.Unlock()
		message := append([]byte(line), payload...)
		if hit && forward {
			c.muted.Store(true)
			message = append(message, "PING\r\n"...) // is answered after the message has arrived
		}
		if forward && !lost && !c.dead() {
			if _, err := to.Write(message); err != nil {
				return
			}
		}
		if hit {
			if forward {
				select {
				case <-c.arrived:
				case <-c.cut:
				}
			}
			c.sever()
			return
		}
	}
}
