package broker

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
)

// For a job that is delivered again nobody rings, and a bell may be lost. So idle workers look without being
// asked. If each looked into every lane of its pools once a second, they would ask the broker 128 000 times a
// second in a farm of 2 000 workers and 16 pools. So those that serve a pool share that work: the more of
// them there are, the less often each looks.
//
// Rejected: asking first whether a pool has anything at all, which saves three of four questions while
// nothing runs in it and costs one more while something does.

const (
	// farmPulls is how many pulls a second the idle workers of a farm make in all, at most, about.
	farmPulls = 1000
	// laneLooks is how often a second each lane is looked into by somebody, or once by each if that is less.
	laneLooks = float64(farmPulls) / (lanes * maxPools)
	// sharesAge is how long the numbers of idle workers count.
	sharesAge = workerBeat

	// lostHeader marks a bell for a job that was found without one. There may be more of them, so whoever
	// finds one by it rings for the next.
	lostHeader = "Jetfarm-Lost"
)

// patrol is how an idle worker looks for jobs that nobody has rung for. Next alone uses it.
type patrol struct {
	q *Queue
	// due says that the next sweep is of those lanes only whose turn it is.
	due    bool
	looks  float64 // laneLooks, but in tests
	shares map[string]float64
	shared time.Time             // when shares were found
	turns  map[string]*lanesTurn // by pool
	last   time.Time             // the last look at turns
	found  *nats.Msg             // the bell to ring because a job was found without one
}

// lanesTurn is whose turn it is in a pool.
type lanesTurn struct {
	due  float64 // how many lanes to look into
	lane int     // the next one
}

func newPatrol(q *Queue) patrol {
	return patrol{q: q, looks: laneLooks, turns: map[string]*lanesTurn{}}
}

// sweep looks into every lane, or into those whose turn it is.
func (p *patrol) sweep(ctx context.Context, pools []string) (*Lease, error) {
	passed := min(time.Since(p.last), 2*p.q.rest).Seconds()
	p.last = time.Now()
	if !p.due {
		return p.q.sweep(ctx, pools)
	}
	p.due = false
	if time.Since(p.shared) > sharesAge {
		p.shares, p.shared = p.q.c.view.shares(p.looks), time.Now()
	}
	for _, pool := range pools {
		turn := p.turn(pool)
		share, known := p.shares[pool]
		if !known {
			share = 1
		}
		turn.due = min(2*lanes, turn.due+lanes*share*passed)
		for range min(lanes, int(turn.due)) {
			turn.due--
			turn.lane = (turn.lane + 1) % lanes
			lease, err := p.pull(ctx, bellSubject+pool, consumerName(pool, turn.lane))
			if lease != nil || err != nil || ctx.Err() != nil {
				return lease, err
			}
		}
	}
	return nil, nil //nolint:nilnil // no job and no error is the common answer
}

// turn begins anywhere, so that workers which start together look at different times.
func (p *patrol) turn(pool string) *lanesTurn {
	turn := p.turns[pool]
	if turn == nil {
		if len(p.turns) > 2*maxPools { // pools that are gone
			clear(p.turns)
		}
		turn = &lanesTurn{due: rand.Float64(), lane: rand.IntN(lanes)} //nolint:gosec // spreads workers
		p.turns[pool] = turn
	}
	return turn
}

// answer looks where a bell says.
func (p *patrol) answer(ctx context.Context, bell *nats.Msg) (*Lease, error) {
	if bell.Header.Get(lostHeader) != "" {
		return p.pull(ctx, bell.Subject, string(bell.Data))
	}
	return p.q.pull(ctx, string(bell.Data))
}

// pull takes a job that nobody has rung for.
func (p *patrol) pull(ctx context.Context, bell, consumer string) (*Lease, error) {
	lease, err := p.q.pull(ctx, consumer)
	if lease != nil {
		p.found = &nats.Msg{Subject: bell, Header: nats.Header{lostHeader: {"1"}}, Data: []byte(consumer)}
	}
	return lease, err
}

// ring rings for the next one, when this worker listens no more if it has no more room.
func (p *patrol) ring(ctx context.Context) {
	if p.found == nil {
		return
	}
	if err := p.q.c.nc.PublishMsg(p.found); err != nil {
		p.q.c.log.WarnContext(ctx, "ring for the next job", "subject", p.found.Subject, "err", err)
	}
	p.found = nil
}

// shares returns how often a second each of the idle workers that serve a pool should look into each of its
// lanes, so that they do it looks times together: once at most.
func (v *view) shares(looks float64) map[string]float64 {
	workers, declared := v.live(), declaredBy(v.remembered())
	shares := map[string]float64{}
	for _, pool := range v.poolNames() {
		asked, serving := v.platform(pool), 0
		for _, w := range workers {
			if !w.Draining && w.Trouble == "" && w.Busy < w.Slots && len(w.Platform.missing(asked, declared)) == 0 {
				serving++
			}
		}
		shares[pool] = min(1, looks/float64(max(1, serving)))
	}
	return shares
}
