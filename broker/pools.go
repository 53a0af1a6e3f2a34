package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
)

// A pool is made by the first action that asks for its platform and goes when nobody has used it for long.
// The key in the bucket of pools says that it exists: workers serve the pools that have one.
//
// A pool is removed in three steps, each by compare-and-set on its key. First the key says that the pool
// leaves, and everybody forgets it; whoever needs it again writes the key anew, which ends the removal. When
// every submitter must have heard of that and no job has come, the key says that the pool is removed now:
// nobody makes it anew while that is so, since a broker that makes and deletes a consumer of one name at
// the same time may lose it. Then the consumers are deleted, and the key last. A job that comes in spite of
// all that is kept by the stream, and whoever watches its operation makes the pool again.

// Jobs that no worker could run for shapeTTL are kept under the token strangerPool, which is no pool and has
// no consumers: clients could use up the pools with mistakes otherwise. When a worker comes that can run
// one, whoever watches its operation moves it.
const strangerPool = "none"

// The values of the key of a pool that is being removed. Of one that is not it is the platform, an array.
const (
	poolLeaves  = `{"leaves":true}`
	poolRemoved = `{"removed":true}`
)

// ErrTooManyPools reports an action whose platform would need one more pool than there may be. The request
// may be repeated: pools that are not used go away.
var ErrTooManyPools = errors.New("too many different platforms are in use")

const (
	// DefaultPoolIdle is how long a pool stays that has no job.
	DefaultPoolIdle = 10 * time.Minute
	// poolGrace is how long a job may still come for a pool after its key is gone: a submitter has heard
	// of that long before, or has lost its connection.
	poolGrace = 2 * requestTimeout
	// poolCheck is how often watchers see to it that a pool of what waits is whole.
	poolCheck = 10 * time.Second
	// poolStuck is how long a removal may take; what takes longer was left by a process that has died.
	poolStuck = 30 * time.Second
	// poolMarks is how long the marks of removed pools stay in the bucket.
	poolMarks = time.Hour
)

// poolKeeper is what a client remembers of its work on pools.
type poolKeeper struct {
	mu      sync.Mutex
	used    bool                 // guarded by mu; whether this client makes pools
	checked map[string]time.Time // guarded by mu, by pool
}

// uses notes that this client makes pools, so that it has to remove some, too.
func (k *poolKeeper) uses() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.used = true
}

func (k *poolKeeper) isUsed() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.used
}

// due tells whether a pool is to be checked, at most every poolCheck.
func (k *poolKeeper) due(pool string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.checked[pool]) < poolCheck {
		return false
	}
	if k.checked == nil || len(k.checked) > 4*maxPools {
		k.checked = map[string]time.Time{}
	}
	k.checked[pool] = time.Now()
	return true
}

// ensurePool makes a pool at its first use.
func (c *Client) ensurePool(ctx context.Context, pool string, platform Platform) error {
	c.keeper.uses()
	if pool == strangerPool || c.view.knows(pool) {
		return nil
	}
	if n := c.view.poolCount(); n >= maxPools {
		return fmt.Errorf("%w: there are %d pools of actions that ask for the same, as many as a farm has, and %v would be one more; ask for fewer different platforms, or try again when one has not been used for %v",
			ErrTooManyPools, n, platform, c.poolIdle)
	}
	return c.makePool(ctx, pool, platform)
}

// makePool makes a pool or what it lacks. It tries again when the broker fails, as it does when another
// client removes the same consumers at that moment.
func (c *Client) makePool(ctx context.Context, pool string, platform Platform) error {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	value, err := json.Marshal(platform)
	if err != nil {
		return fmt.Errorf("encode platform: %w", err)
	}
	for attempt := 0; ; attempt++ {
		err := c.tryPool(ctx, pool, value)
		if err == nil {
			c.view.addPool(pool, platform)
			return nil
		}
		if !errors.Is(err, ErrUnavailable) || attempt >= maxTries || pause(ctx, attempt) != nil {
			return err
		}
	}
}

func (c *Client) tryPool(ctx context.Context, pool string, value []byte) error {
	if pool != defaultPool {
		if err := c.writePool(ctx, pool, value); err != nil {
			return unavailable(cause(ctx, err))
		}
	}
	if err := c.ensureConsumers(ctx, pool); err != nil {
		return unavailable(cause(ctx, err))
	}
	return nil
}

// leaving tells whether a pool is being removed.
func leaving(entry jetstream.KeyValueEntry) bool {
	return string(entry.Value()) == poolLeaves || string(entry.Value()) == poolRemoved
}

// writePool writes the key of a pool unless it is there.
func (c *Client) writePool(ctx context.Context, pool string, value []byte) error {
	entry, err := c.pools.Get(ctx, pool)
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		_, err = c.pools.Create(ctx, pool, value)
		return err
	case err != nil:
		return err
	case string(entry.Value()) == poolRemoved && time.Since(entry.Created()) < poolStuck:
		return errors.New("the pool is being removed")
	case leaving(entry):
		_, err = c.pools.Update(ctx, pool, value, entry.Revision())
		return err
	}
	return nil
}

// checkPool makes the pool of an operation that waits whole again, if it was removed while the operation
// came or its maker has died halfway.
func (c *Client) checkPool(ctx context.Context, r *record) {
	if r.Stage != repb.ExecutionStage_QUEUED || r.Pool == strangerPool || !c.keeper.due(r.Pool) {
		return
	}
	if err := c.makePool(ctx, r.Pool, r.Platform); err != nil && ctx.Err() == nil {
		c.log.WarnContext(ctx, "check pool", "pool", r.Pool, "err", err)
	}
}

// sweepPools removes pools that nobody has used for long, until ctx ends. Clients that submit nothing
// leave that to others.
func (c *Client) sweepPools(ctx context.Context) error {
	for {
		interval := c.poolIdle / 5
		timer := time.NewTimer(interval/2 + rand.N(interval)) //nolint:gosec // spreads the sweeps
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		if c.keeper.isUsed() {
			c.sweepOnce(ctx)
		}
	}
}

func (c *Client) sweepOnce(ctx context.Context) {
	pools, err := c.pools.Keys(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) && ctx.Err() == nil {
		c.log.WarnContext(ctx, "list the pools", "err", err)
	}
	removed := false
	for _, pool := range pools {
		gone, err := c.reclaim(ctx, pool)
		if err != nil && ctx.Err() == nil {
			c.log.WarnContext(ctx, "remove a pool that nobody uses", "pool", pool, "err", err)
		}
		removed = removed || gone
	}
	if !removed {
		return
	}
	if err := c.pools.PurgeDeletes(ctx, jetstream.DeleteMarkersOlderThan(poolMarks)); err != nil && ctx.Err() == nil {
		c.log.WarnContext(ctx, "remove the marks of pools", "err", err)
	}
}

// reclaim removes a pool if nobody has used it for long, and tells whether it did.
func (c *Client) reclaim(ctx context.Context, pool string) (bool, error) {
	if pool == defaultPool {
		return false, nil
	}
	entry, err := c.pools.Get(ctx, pool)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		c.view.dropPool(pool)
		return false, nil
	}
	if err != nil {
		return false, unavailable(err)
	}
	if leaving(entry) && time.Since(entry.Created()) < poolStuck {
		return false, nil // another client removes it
	}
	if idle, err := c.unused(ctx, pool, entry.Created()); err != nil || !idle {
		return false, err
	}
	revision, err := c.pools.Update(ctx, pool, []byte(poolLeaves), entry.Revision())
	if err != nil {
		return false, unlessFirst(err)
	}
	c.view.dropPool(pool)
	timer := time.NewTimer(min(poolGrace, c.poolIdle))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done(): // another client goes on with it
		return false, context.Cause(ctx)
	}
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	if used, err := c.hasJobs(ctx, pool); err != nil || used {
		return false, errors.Join(err, c.restorePool(ctx, pool, entry.Value(), revision))
	}
	if revision, err = c.pools.Update(ctx, pool, []byte(poolRemoved), revision); err != nil {
		return false, unlessFirst(err)
	}
	if err := c.deleteConsumers(ctx, pool); err != nil {
		return false, err
	}
	if used, err := c.hasJobs(ctx, pool); err != nil || used {
		return false, errors.Join(err, c.restorePool(ctx, pool, entry.Value(), revision))
	}
	if err := c.pools.Delete(ctx, pool, jetstream.LastRevision(revision)); err != nil {
		return false, unlessFirst(err)
	}
	c.log.InfoContext(ctx, "pool removed that nobody used", "pool", pool, "platform", string(entry.Value()))
	return true, nil
}

// deleteConsumers is the opposite of ensureConsumers.
func (c *Client) deleteConsumers(ctx context.Context, pool string) error {
	err := c.js.DeleteConsumer(ctx, heldStream, pool)
	for lane := 0; lane < lanes && (err == nil || errors.Is(err, jetstream.ErrConsumerNotFound)); lane++ {
		err = c.js.DeleteConsumer(ctx, jobsStream, consumerName(pool, lane))
	}
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil
	}
	return unavailable(err)
}

// restorePool ends the removal of a pool for which a job has come.
func (c *Client) restorePool(ctx context.Context, pool string, value []byte, revision uint64) error {
	if string(value) == poolLeaves || string(value) == poolRemoved {
		return nil // what it was is not known; whoever watches the job's operation writes it
	}
	if err := c.ensureConsumers(ctx, pool); err != nil {
		return unavailable(err)
	}
	_, err := c.pools.Update(ctx, pool, value, revision)
	return unlessFirst(err)
}

// unlessFirst is nil for an error that says that another client has written a key first.
func unlessFirst(err error) error {
	if api, ok := errors.AsType[*jetstream.APIError](err); ok && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant) {
		return nil
	}
	return unavailable(err)
}

// hasJobs tells whether a job of a pool waits or runs, with a consumer or without.
func (c *Client) hasJobs(ctx context.Context, pool string) (bool, error) {
	for prefix, stream := range map[string]jetstream.Stream{jobSubject: c.jobs, heldSubject: c.held} {
		info, err := stream.Info(ctx, jetstream.WithSubjectFilter(prefix+pool+".>"))
		if err != nil {
			return true, unavailable(err)
		}
		if len(info.State.Subjects) > 0 {
			return true, nil
		}
	}
	return false, nil
}

// unused tells whether no job of a pool waits or runs, and none has for Config.PoolIdle.
func (c *Client) unused(ctx context.Context, pool string, last time.Time) (bool, error) {
	for lane := range lanes {
		consumer, err := c.jobs.Consumer(ctx, consumerName(pool, lane))
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			continue
		}
		if err != nil {
			return false, unavailable(err)
		}
		info := consumer.CachedInfo()
		if info.NumPending > 0 || info.NumAckPending > 0 {
			return false, nil
		}
		for _, at := range []*time.Time{&info.Created, info.Delivered.Last, info.AckFloor.Last} {
			if at != nil && at.After(last) {
				last = *at
			}
		}
	}
	return time.Since(last) >= c.poolIdle, nil
}

// homeless tells whether an operation waits for a pool that its job may go to.
func (o *Operation) homeless() bool {
	return o.Pool == strangerPool && o.Stage == repb.ExecutionStage_QUEUED
}

// stranded returns a channel that is closed when there may be a pool for the job of a homeless operation, and
// nil for no operation.
func (w *watcher) stranded(op *Operation) <-chan struct{} {
	if op == nil || w.moved {
		return nil
	}
	w.c.view.mu.Lock()
	changed := w.c.view.changed
	w.c.view.mu.Unlock()
	if w.c.view.route(op.Platform).stranger {
		return changed
	}
	now := make(chan struct{})
	close(now)
	return now
}

// move puts the job of an operation that had no pool into one, if there is one now. Until the next heartbeat
// that is tried once.
func (w *watcher) move(ctx context.Context, op *Operation) {
	to := w.c.view.route(op.Platform)
	if to.stranger {
		return
	}
	w.moved = true
	if err := w.c.move(ctx, op.Name, to); err != nil && ctx.Err() == nil {
		w.c.log.WarnContext(ctx, "put an operation into a pool", "operation", op.Name, "err", err)
	}
}

// move removes the job before it changes the record, so that there are never two. One that is lost in
// between is queued again by whoever watches the operation.
func (c *Client) move(ctx context.Context, operation string, to route) error {
	pool := to.poolName()
	if err := c.ensurePool(ctx, pool, to.pool); err != nil {
		return err
	}
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	if err := c.jobs.Purge(ctx, jetstream.WithPurgeSubject(jobSubject+strangerPool+".*."+operation)); err != nil {
		return unavailable(err)
	}
	var placed *record
	var queue func(context.Context, *record) error
	r, revision, err := c.update(ctx, operation, func(r *record) error {
		if placed != nil {
			c.holds.forget(placed)
		}
		if r.Pool != strangerPool || r.Stage != repb.ExecutionStage_QUEUED {
			return errUnchanged
		}
		r.Pool = pool
		placed, queue = r, c.queueOf(r)
		return nil
	})
	if err != nil && placed != nil {
		c.holds.forget(placed)
	}
	if errors.Is(err, errUnchanged) || errors.Is(err, ErrNotFound) {
		return nil // another watcher was first, or it has ended
	}
	if err != nil {
		return err
	}
	job := *r
	job.Revision = revision
	if err := queue(ctx, &job); err != nil {
		c.holds.forget(&job)
		return err
	}
	return nil
}

// queueOf decides where a job goes, and its lane: into the queue, among those that wait for their turn, or
// where jobs stay that no worker can run.
func (c *Client) queueOf(r *record) func(context.Context, *record) error {
	switch {
	case r.Pool == strangerPool:
		r.Lane = laneOf(r.Priority)
		return c.publishStranger
	case c.place(r):
		return c.publishJob
	}
	return c.hold
}

// maxStrangers bounds the jobs in the whole farm that no worker could run within shapeTTL.
const maxStrangers = 1000

// publishStranger is publishJob for a job that no worker can run.
func (c *Client) publishStranger(ctx context.Context, job *record) error {
	bound, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	info, err := c.jobs.Info(bound, jetstream.WithSubjectFilter(jobSubject+strangerPool+".>"))
	if err != nil {
		return unavailable(cause(bound, err))
	}
	if len(info.State.Subjects) >= maxStrangers {
		return fmt.Errorf("%w: %d operations wait for workers that nobody has seen", ErrQueueFull, maxStrangers)
	}
	return c.publishJob(ctx, job)
}

// beat is how long a watcher waits for a change: until the next heartbeat, or until the patience with an
// operation that no worker can serve has ended.
func (w *watcher) beat(op *Operation) time.Duration {
	if op.Stage != repb.ExecutionStage_QUEUED {
		return w.c.heartbeat
	}
	to := w.c.view.route(op.Platform)
	if to.refused == nil {
		w.refused = time.Time{}
		return w.c.heartbeat
	}
	if w.refused.IsZero() {
		w.refused = time.Now()
	}
	return min(w.c.heartbeat, max(time.Until(w.refused.Add(w.c.patienceFor(to))), 0)+time.Millisecond)
}

// giveUp ends an operation that no worker can serve when the patience with it has ended. A watcher that
// does not count leaves that to others.
func (w *watcher) giveUp(ctx context.Context, op *Operation) {
	if w.silent || op.Stage != repb.ExecutionStage_QUEUED || w.refused.IsZero() {
		return
	}
	to := w.c.view.route(op.Platform)
	waited := time.Since(w.refused)
	if to.refused == nil || waited < w.c.patienceFor(to) {
		return
	}
	text := fmt.Sprintf("%v; none came in %v", to.refused, waited.Round(time.Millisecond))
	if err := w.c.end(ctx, op.Name, code.Code_FAILED_PRECONDITION, text); err != nil && ctx.Err() == nil {
		w.c.log.WarnContext(ctx, "end operation that nobody can serve", "operation", op.Name, "err", err)
	}
}
