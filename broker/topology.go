package broker

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// The streams, buckets and subjects of operations. docs/PROTOCOL.md describes them for readers.
const (
	operationsStream = "OPERATIONS"
	jobsStream       = "JOBS"
	heldStream       = "HELD"
	flightsStream    = "FLIGHTS"
	deadStream       = "DEAD"
	poolsBucket      = "pools"
	workersBucket    = "workers"
	shapesBucket     = "shapes"

	operationSubject = "jetfarm.op."
	statusSubject    = "jetfarm.status."
	jobSubject       = "jetfarm.job."
	heldSubject      = "jetfarm.held."
	flightSubject    = "jetfarm.flight."
	deadSubject      = "jetfarm.dead."
	bellSubject      = "jetfarm.bell."
	workerSubject    = "jetfarm.worker."
	logSubject       = "jetfarm.log."
	tookSubject      = "jetfarm.took."
	flowsSubject     = "jetfarm.flows"
)

const (
	// lanes is the number of lanes of a pool, 0 the soonest.
	lanes = 4
	// maxPools bounds the shapes that clients can ask for: each has a consumer per lane, and a stream
	// slows down with its consumers.
	maxPools = 16
	// duplicates is the shortest deduplication window the server allows; nothing here relies on it and
	// a long one makes a restart read back what was written within it.
	duplicates = 100 * time.Millisecond
	// retention is how long a finished operation can still be asked for.
	retention = time.Hour
	// abandonedAfter ends the record of an operation that nobody ended, watched or changed.
	abandonedAfter = 72 * time.Hour
	// flightTTL ends a flight that nobody released; the record of its operation decides before that.
	flightTTL = abandonedAfter
)

// laneOf is the lane of what a build has submitted last; what it has few of are in the one before.
func laneOf(priority int32) int {
	switch {
	case priority < 0:
		return 1
	case priority == 0:
		return 2
	}
	return 3
}

func jobSubjectOf(r *record) string {
	return jobSubject + r.Pool + "." + strconv.Itoa(r.Lane) + "." + r.Operation
}

func heldSubjectOf(r *record) string { return heldSubject + r.Pool + "." + r.Operation }

func consumerName(pool string, lane int) string { return pool + "-" + strconv.Itoa(lane) }

// Open makes the streams and buckets that operations need, or brings existing ones up to date, and
// waits for the broker to be able to (a cluster that has no quorum yet, a server without JetStream)
// until ctx ends.
func (c *Client) Open(ctx context.Context) error {
	var last error
	for attempt := 0; ; attempt++ {
		last = c.open(ctx)
		if last == nil || !retryable(last) {
			return last
		}
		if attempt == 0 || attempt%20 == 0 {
			c.log.WarnContext(ctx, "waiting for jetstream", "err", last)
		}
		if err := pause(ctx, attempt); err != nil {
			return fmt.Errorf("set up jetstream: %w (last error: %w)", err, last)
		}
	}
}

func (c *Client) open(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 4*requestTimeout, ErrUnavailable)
	defer cancel()
	if err := c.keepReplicas(ctx); err != nil {
		return err
	}
	streams := []jetstream.StreamConfig{
		{
			Name: operationsStream, Description: "jetfarm: the last state of each operation",
			Subjects: []string{operationSubject + "*"}, MaxMsgsPerSubject: 1, AllowMsgTTL: true,
			AllowDirect: c.replicas == 1, Duplicates: duplicates, Replicas: c.replicas,
			RePublish: &jetstream.RePublish{Source: operationSubject + "*", Destination: statusSubject + "{{wildcard(1)}}"},
		},
		{
			Name: jobsStream, Description: "jetfarm: operations that wait for a worker or run on one",
			Subjects: []string{jobSubject + "*.*.*"}, Retention: jetstream.WorkQueuePolicy, MaxMsgs: c.maxQueued, MaxAge: abandonedAfter,
			MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, DiscardNewPerSubject: true,
			Duplicates: duplicates, Replicas: c.replicas,
		},
		{
			Name: heldStream, Description: "jetfarm: operations whose turn to enter the queue has not come",
			Subjects: []string{heldSubject + "*.*"}, MaxMsgs: c.maxQueued, MaxMsgsPerSubject: 1, MaxAge: abandonedAfter,
			Discard: jetstream.DiscardNew, DiscardNewPerSubject: true,
			AllowDirect: c.replicas == 1, Duplicates: duplicates, Replicas: c.replicas,
		},
		{
			Name: flightsStream, Description: "jetfarm: which operation runs an action that others may join",
			Subjects: []string{flightSubject + "*.*"}, MaxMsgsPerSubject: 1, MaxAge: flightTTL,
			AllowDirect: c.replicas == 1, Duplicates: duplicates, Replicas: c.replicas,
		},
		{
			Name: deadStream, Description: "jetfarm: operations that were set aside because all their attempts failed",
			Subjects: []string{deadSubject + "*"}, MaxMsgsPerSubject: 1, MaxMsgs: maxLetters, MaxBytes: maxLetterBytes, MaxAge: letterTTL,
			AllowDirect: c.replicas == 1, Duplicates: duplicates, Replicas: c.replicas,
		},
	}
	for _, cfg := range streams {
		if _, err := c.js.CreateOrUpdateStream(ctx, cfg); err != nil {
			return fmt.Errorf("stream %s: %w", cfg.Name, err)
		}
	}
	if err := c.bind(ctx); err != nil {
		return err
	}
	var err error
	c.pools, err = c.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: poolsBucket, Replicas: c.replicas})
	if err != nil {
		return fmt.Errorf("bucket %s: %w", poolsBucket, err)
	}
	c.registry, err = c.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: workersBucket, TTL: workerTTL, Replicas: c.replicas,
	})
	if err != nil {
		return fmt.Errorf("bucket %s: %w", workersBucket, err)
	}
	c.leases, err = c.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: leasesBucket, TTL: max(2*c.reconciles, time.Second), Replicas: c.replicas,
	})
	if err != nil {
		return fmt.Errorf("bucket %s: %w", leasesBucket, err)
	}
	c.shapes, err = c.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: shapesBucket, TTL: shapeTTL, Replicas: c.replicas,
	})
	if err != nil {
		return fmt.Errorf("bucket %s: %w", shapesBucket, err)
	}
	return c.ensureConsumers(ctx, defaultPool)
}

// bind gets the streams that are there.
func (c *Client) bind(ctx context.Context) error {
	for name, stream := range map[string]*jetstream.Stream{
		operationsStream: &c.operations, jobsStream: &c.jobs, heldStream: &c.held, flightsStream: &c.flights, deadStream: &c.dead,
	} {
		var err error
		if *stream, err = c.js.Stream(ctx, name); err != nil {
			return fmt.Errorf("stream %s: %w", name, err)
		}
	}
	return nil
}

// ErrNoFarm reports a NATS server that no farm has used.
var ErrNoFarm = errors.New("there is no jetfarm farm on this NATS server")

// Attach is Open for an operator: it makes and changes nothing, and reads the registries once, so that
// Run is not needed. The error wraps ErrNoFarm or ErrUnavailable.
func (c *Client) Attach(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*requestTimeout, ErrUnavailable)
	defer cancel()
	err := c.bind(ctx)
	if err == nil {
		c.pools, err = c.js.KeyValue(ctx, poolsBucket)
	}
	if err == nil {
		c.registry, err = c.js.KeyValue(ctx, workersBucket)
	}
	if err == nil {
		c.shapes, err = c.js.KeyValue(ctx, shapesBucket)
	}
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound), errors.Is(err, jetstream.ErrBucketNotFound):
		return fmt.Errorf("%w: %w", ErrNoFarm, err)
	case err != nil:
		return unavailable(cause(ctx, err))
	}
	return errors.Join(readAll(ctx, c.registry, c.view.sawWorker), readAll(ctx, c.pools, c.view.sawPool), readAll(ctx, c.shapes, c.view.sawShape))
}

// readAll hands each entry of a bucket to see.
func readAll(ctx context.Context, kv jetstream.KeyValue, see func(jetstream.KeyValueEntry)) error {
	watcher, err := kv.WatchAll(ctx)
	if err != nil {
		return unavailable(cause(ctx, err))
	}
	defer watcher.Stop() //nolint:errcheck // the watch is over, whatever the server answers
	for {
		select {
		case <-ctx.Done():
			return unavailable(context.Cause(ctx))
		case entry, ok := <-watcher.Updates():
			if !ok || entry == nil { // what follows are changes
				return nil
			}
			see(entry)
		}
	}
}

// keepReplicas makes a client that was not told a number of replicas keep the one that is in force. It
// is the first question of open: a cluster without a leader never answers, so it waits for a moment only.
func (c *Client) keepReplicas(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, leaderTimeout, ErrUnavailable)
	defer cancel()
	s, err := c.js.Stream(ctx, operationsStream)
	switch {
	case err != nil && !errors.Is(err, jetstream.ErrStreamNotFound):
		return cause(ctx, err)
	case c.replicas > 0:
	case err != nil:
		c.replicas = 1
	default:
		c.replicas = s.CachedInfo().Config.Replicas
	}
	return nil
}

// Replicas is how many servers hold each message, once Open has returned.
func (c *Client) Replicas() int { return c.replicas }

func (c *Client) ensureConsumers(ctx context.Context, pool string) error {
	for lane := range lanes {
		_, err := c.js.CreateOrUpdateConsumer(ctx, jobsStream, jetstream.ConsumerConfig{
			Durable: consumerName(pool, lane), FilterSubject: jobSubject + pool + "." + strconv.Itoa(lane) + ".*",
			AckPolicy: jetstream.AckExplicitPolicy, AckWait: c.ackWait, MaxDeliver: maxDeliveries, MaxAckPending: -1, MaxWaiting: 4096,
		})
		if err != nil {
			return fmt.Errorf("consumer %s: %w", consumerName(pool, lane), err)
		}
	}
	// Nobody pulls from this one; it counts what is held.
	_, err := c.js.CreateOrUpdateConsumer(ctx, heldStream, jetstream.ConsumerConfig{
		Durable: pool, FilterSubject: heldSubject + pool + ".*", AckPolicy: jetstream.AckNonePolicy,
	})
	if err != nil {
		return fmt.Errorf("consumer %s: %w", pool, err)
	}
	return nil
}

// leaderTimeout is how long a process that starts waits for an answer before it asks again.
const leaderTimeout = 2 * time.Second

// noPeers is the broker's code for a cluster that does not know enough servers yet.
const noPeers = 10005

// retryable tells errors of a broker that is not up yet from those that waiting cannot mend.
func retryable(err error) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return !ok || api.Code >= 500 || api.Code == 408 || api.ErrorCode == noPeers
}
