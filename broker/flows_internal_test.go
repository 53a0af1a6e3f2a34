package broker

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
)

// holder returns a client that does not run, and its connection.
func holder(t testing.TB) (*Client, *nats.Conn) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	s, err := StartServer(t.Context(), ServerConfig{Dir: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Stop() })
	nc, err := Connect(t.Context(), ConnectConfig{Embedded: s, Name: t.Name(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	c, err := New(Config{Conn: nc, Submits: true, Log: log, Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	return c, nc
}

// TestWhoCouldNotHearBlamesNobody: after a pause of this process or its connection the others count as
// alive until they had the time to speak.
func TestWhoCouldNotHearBlamesNobody(t *testing.T) {
	c, _ := holder(t)
	h := &c.holds
	peer := newName()
	old := func(beat time.Duration) {
		h.heard(fmt.Appendf(nil, `{"holder":%q,"builds":{"any":1}}`, peer))
		s := h.peers[peer]
		s.at = time.Now().Add(-2 * peerTTL)
		h.peers[peer] = s
		h.beaten = time.Now().Add(-beat)
	}
	if old(2 * peerTTL); c.beat(t.Context()) || len(h.peers) != 1 {
		t.Error("a process that was stopped takes over what others hold")
	}
	if old(holdBeat); !c.beat(t.Context()) || len(h.peers) != 0 {
		t.Error("a holder that has been silent for long counts as alive")
	}
	old(holdBeat)
	c.nc.Close()
	if c.beat(t.Context()) || len(h.peers) != 1 {
		t.Error("a process without a connection takes over what others hold")
	}
}

// TestWeight is by instance names, then by builds.
func TestWeight(t *testing.T) {
	c, _ := holder(t)
	h := &c.holds
	hold := func(tenant string, builds int) {
		for n := range builds {
			c.queueHeld(&waiting{operation: newName(), pool: defaultPool, flow: flow{tenant, fmt.Sprint(n)}})
		}
	}
	want := func(mine, all float64) {
		t.Helper()
		if m, a := h.weight(defaultPool, c.poolHolds(defaultPool)); m != mine || a != all {
			t.Errorf("weight %v of %v, want %v of %v", m, a, mine, all)
		}
	}
	want(1, 1)
	h.heard(fmt.Appendf(nil, `{"holder":%q,"builds":{"any":4},"flows":{"any":{"a":3,"b":1}}}`, newName()))
	want(1, 3)
	hold("a", 1)
	want(0.25, 2)
	hold("c", 5)
	want(1.25, 3)
	h.heard(fmt.Appendf(nil, `{"holder":%q,"builds":{"any":2}}`, newName()))
	want(1.25, 5)
}

func TestMostNamesTheLargest(t *testing.T) {
	counts := map[string]int{}
	for n := range 1000 {
		counts[fmt.Sprint(n)] = 1 + 100*(n/999)
	}
	if got := most(counts); len(got) != 1 || got["999"] != 101 {
		t.Errorf("of very many tenants %v are named", got)
	}
}

// BenchmarkHolder is a beat, and a look whose turn it is, while 100 000 jobs of 1 000 builds of so many
// tenants wait in 16 pools.
func BenchmarkHolder(b *testing.B) {
	for _, tenants := range []int{1, 1000, 100_000} {
		c, _ := holder(b)
		const jobs, builds, pools = 100_000, 1000, 16
		for n := range jobs {
			c.queueHeld(&waiting{
				operation: newName(), lane: n / pools % lanes, pool: fmt.Sprint("pool", n%pools), payload: make([]byte, 1),
				flow: flow{fmt.Sprint("tenant ", n%tenants), fmt.Sprint("build ", n%builds)},
			})
		}
		for n := range 3 {
			c.holds.heard(fmt.Appendf(nil, `{"holder":%q,"builds":{"pool%d":40}}`, newName(), n))
		}
		b.Run(fmt.Sprintf("beat/tenants=%d", tenants), func(b *testing.B) {
			for b.Loop() {
				c.beat(b.Context())
			}
		})
		c.holds.due() // fills the windows
		b.Run(fmt.Sprintf("due/tenants=%d", tenants), func(b *testing.B) {
			for b.Loop() {
				c.holds.due()
			}
		})
	}
}
