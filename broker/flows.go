package broker

import (
	"context"
	"encoding/json"
	"maps"
	"time"
)

const (
	// maxTenants bounds the tenants that a holder names to the others, those with the most first.
	maxTenants = 100
	// maxPeers and maxSaid bound what is believed of what others say: how many they and their pools are, and
	// how much they have.
	maxPeers, maxSaid = 1000, 1 << 20
)

// holderState is what a holder says of itself on flowsSubject.
type holderState struct {
	Holder string `json:"holder"`
	// Builds counts those that have something held, by pool, and Flows by pool and tenant.
	Builds map[string]int            `json:"builds,omitempty"`
	Flows  map[string]map[string]int `json:"flows,omitempty"`
	// Tenants counts held jobs.
	Tenants map[string]int `json:"tenants,omitempty"`
	// Leaves is said by one that stops.
	Leaves bool `json:"leaves,omitempty"`
	at     time.Time
}

// believe makes what was said by anybody usable.
func (s *holderState) believe() bool {
	if !validName(s.Holder) || len(s.Builds) > maxPeers || len(s.Flows) > maxPeers || len(s.Tenants) > maxTenants {
		return false
	}
	clamp(s.Builds)
	clamp(s.Tenants)
	for _, tenants := range s.Flows {
		if len(tenants) > maxTenants {
			return false
		}
		clamp(tenants)
	}
	return true
}

func clamp(counts map[string]int) {
	for name, n := range counts {
		counts[name] = min(max(n, 0), maxSaid)
	}
}

// heard notes what another holder says, and tells whether it leaves jobs to others.
func (h *holds) heard(payload []byte) (left bool) {
	var s holderState
	if json.Unmarshal(payload, &s) != nil || s.Holder == h.name || !s.believe() {
		return false
	}
	s.at = time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	_, known := h.peers[s.Holder]
	switch {
	case len(s.Builds) == 0 || s.Leaves:
		delete(h.peers, s.Holder)
	case known || len(h.peers) < maxPeers:
		h.peers[s.Holder] = s
	}
	return s.Leaves
}

// beat brings the windows up to date and tells others what is held. It returns whether a holder fell
// silent.
func (c *Client) beat(ctx context.Context) (silent bool) {
	h := &c.holds
	h.mu.Lock()
	now := time.Now()
	// Whoever could not hear does not know who was silent.
	deaf := !c.nc.IsConnected() || now.Sub(h.beaten) > 2*holdBeat
	h.beaten = now
	for name, peer := range h.peers {
		if deaf {
			peer.at = now
			h.peers[name] = peer
		} else if now.Sub(peer.at) > peerTTL {
			delete(h.peers, name)
			silent = true
		}
	}
	state := holderState{Holder: h.name, Builds: map[string]int{}, Flows: map[string]map[string]int{}, Tenants: most(h.tenants)}
	for pool, p := range h.pools {
		p.window = c.windowOf(pool, p)
		if n := p.builds(); n > 0 {
			state.Builds[pool], state.Flows[pool] = n, most(p.tenants())
		} else if p.idle() {
			delete(h.pools, pool)
		}
	}
	for f, b := range h.bursts {
		if b.tokens+int(now.Sub(b.at)/burstRefill) >= burst {
			delete(h.bursts, f)
		}
	}
	says := len(state.Builds) > 0 || h.said
	h.said = len(state.Builds) > 0
	h.mu.Unlock()
	if says {
		c.say(ctx, state)
	}
	return silent
}

// leave tells others that they have to take over what is held here.
func (c *Client) leave(ctx context.Context) {
	if c.holds.leavesJobs() && !c.nc.IsClosed() {
		c.say(ctx, holderState{Holder: c.holds.name, Leaves: true})
	}
}

// leavesJobs tells whether something may be in HELD that this process would have let in.
func (h *holds) leavesJobs() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.said || len(h.held) > 0 {
		return true
	}
	for _, p := range h.pools {
		for lane := range p.lanes {
			for _, job := range p.lanes[lane].in {
				if job.sequence == 0 {
					return true
				}
			}
		}
	}
	return false
}

func (c *Client) say(ctx context.Context, state holderState) {
	payload, err := json.Marshal(state)
	if err == nil {
		err = c.nc.Publish(flowsSubject, payload)
	}
	if err != nil {
		c.log.WarnContext(ctx, "tell what is held", "err", err)
	}
}

// most returns the entries with the highest counts. Those with less than a share of 1 in maxTenants are left out
// when there are many, which spares to sort them.
func most(counts map[string]int) map[string]int {
	if len(counts) <= maxTenants {
		return maps.Clone(counts)
	}
	sum := 0
	for _, n := range counts {
		sum += n
	}
	most := map[string]int{}
	for name, n := range counts {
		if n*maxTenants > sum {
			most[name] = n
		}
	}
	return most
}

// windowOf returns how many jobs this process may have in each lane of a pool: its share of what the pool
// needs. It is called with mu held.
func (c *Client) windowOf(pool string, p *poolHolds) int {
	slots := 0
	for _, w := range c.view.serving(c.view.platform(pool)) {
		slots += w.Slots
	}
	window := spareJobs + slots/slotsPerSpare
	mine, all := c.holds.weight(pool, p)
	return max(1, int(float64(window)*mine/all+0.999))
}

// weight returns what this process has of a pool and what all have: each tenant weighs the same, and is divided by
// the builds that it has something held of. A build whose tenant was not named counts as one. It is called
// with mu held.
func (h *holds) weight(pool string, p *poolHolds) (mine, all float64) {
	total, unnamed := map[string]int{}, 0
	for _, peer := range h.peers {
		n := peer.Builds[pool]
		for tenant, builds := range peer.Flows[pool] {
			total[tenant] += builds
			n -= builds
		}
		unnamed += max(0, n)
	}
	if len(total)+unnamed == 0 {
		return 1, 1
	}
	own := p.tenants()
	if len(own) == 0 { // it may let in what comes
		return 1, float64(len(total) + unnamed + 1)
	}
	for tenant, builds := range own {
		mine += float64(builds) / float64(builds+total[tenant])
		total[tenant] += builds
	}
	return mine, float64(len(total) + unnamed)
}

// tenants counts the builds of each tenant that have something held.
func (p *poolHolds) tenants() map[string]int {
	counts := map[string]int{}
	for lane := range p.lanes {
		for name, tenant := range p.lanes[lane].queue.named {
			if tenant.builds > 0 {
				counts[name] += tenant.builds
			}
		}
	}
	return counts
}

// builds counts those that have something held.
func (p *poolHolds) builds() int {
	n := 0
	for lane := range p.lanes {
		n += p.lanes[lane].queue.builds
	}
	return n
}
