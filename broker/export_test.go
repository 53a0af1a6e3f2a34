package broker

import (
	"context"
	"errors"
	"time"
)

// SetIdleSweep sets how long a worker sleeps in the end when nobody rings. It is called before Next.
func (q *Queue) SetIdleSweep(d time.Duration) { q.rest = d }

// SetLaneLooks sets how often a second the idle workers of a farm look into a lane. It is called before Next.
func (q *Queue) SetLaneLooks(n float64) { q.patrol.looks = n }

// SetPullBound shortens the bound of a pull.
func (q *Queue) SetPullBound(d time.Duration) { q.bound = d }

// Reconcile takes one turn of the reconciler.
func (c *Client) Reconcile(ctx context.Context) error {
	r := &reconciler{c: c}
	return errors.Join(r.queues(ctx), r.flights(ctx))
}

// Busy is what the registry says of busy slots.
func (q *Queue) Busy() int { return q.info().Busy }

// Lanes is how many consumers a pool has.
const Lanes = lanes

// LaneLooks is how often a second the idle workers of a farm look into a lane.
const LaneLooks = laneLooks

// Adopt takes over what dead holders held, as far as a holder looks for that now and then.
func (c *Client) Adopt(ctx context.Context) { c.adopt(ctx, false) }

// Widen lets n jobs into each lane of the default pool until the next beat.
func (c *Client) Widen(n int) {
	c.holds.mu.Lock()
	c.holds.pools[defaultPool].window = n
	c.holds.mu.Unlock()
	c.holds.poke()
}

// Heard counts the jobs that others hold, as they have said last.
func (c *Client) Heard() (held int) {
	c.holds.mu.Lock()
	defer c.holds.mu.Unlock()
	for _, peer := range c.holds.peers {
		for _, n := range peer.Tenants {
			held += n
		}
	}
	return held
}
