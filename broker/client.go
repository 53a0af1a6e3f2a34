package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
)

// Config says how a Client works. Only Conn and Log are required.
type Config struct {
	// Conn carries operations, their status and the queue. Blobs travel on other connections.
	Conn *nats.Conn
	// Replicas of the streams that Open makes or updates; 0 keeps what is there, or else makes 1.
	Replicas int
	// AckWait is how long a job may be silent before another worker gets it.
	AckWait time.Duration
	// MaxQueued bounds the operations that wait in the whole farm, and MaxTenant those of one instance name.
	MaxQueued, MaxTenant int64
	// Submits makes Run hold back what this process submits until its turn comes, and take over what
	// others held that are gone. A process that submits without it lets everything in at once.
	Submits bool
	// Heartbeat is how often a watcher hears of an operation that does not change.
	Heartbeat time.Duration
	// MendAfter is the age at which a watcher suspects that a queued operation has no job.
	MendAfter time.Duration
	// Patience is how long an operation waits for a worker that can serve it while there are only others, and
	// a tenth of that if no worker could within a week. A negative one refuses it at once.
	Patience time.Duration
	// PoolIdle is how long a pool stays that has no job.
	PoolIdle time.Duration
	// Abandoned is how long an operation goes on when nobody watches it.
	Abandoned time.Duration
	// Reconcile is how often one process of the farm looks for what others have left undone.
	Reconcile time.Duration
	Log       *slog.Logger
	// Registerer gets the metrics; nil is none.
	Registerer prometheus.Registerer
}

// The defaults of Config.
const (
	DefaultAckWait   = 15 * time.Second
	DefaultMaxQueued = 200_000
	DefaultMaxTenant = 100_000
	DefaultHeartbeat = 20 * time.Second
	DefaultMendAfter = 15 * time.Second
	DefaultPatience  = 5 * time.Minute
	DefaultAbandoned = time.Minute
	DefaultReconcile = 15 * time.Second
)

// Client is a process's view of the operations of the farm. New makes one, Open prepares the broker,
// Run keeps the view of workers and pools current and ends operations that were abandoned.
type Client struct {
	nc         *nats.Conn
	js         jetstream.JetStream
	log        *slog.Logger
	replicas   int
	ackWait    time.Duration
	maxQueued  int64
	maxTenant  int64
	submits    bool
	heartbeat  time.Duration
	mendAfter  time.Duration
	patience   time.Duration
	abandoned  time.Duration
	poolIdle   time.Duration
	reconciles time.Duration
	metrics    *metrics

	operations, jobs, held, flights, dead jetstream.Stream
	pools, registry, leases, shapes       jetstream.KeyValue

	// id names this process in the lease of the reconciler, which alone uses leading, the lease's revision.
	id      string
	leading uint64

	view     view
	keeper   poolKeeper
	departed departures
	busy     busy
	holds    holds

	mu  sync.Mutex
	gap chan struct{} // guarded by mu; closed and replaced when messages may have been missed
}

// New returns a client on cfg.Conn, whose reconnect handler it takes over.
func New(cfg Config) (*Client, error) {
	js, err := jetstream.New(cfg.Conn, jetstream.WithDefaultTimeout(requestTimeout))
	if err != nil {
		return nil, fmt.Errorf("jetstream: %w", err)
	}
	c := &Client{
		nc: cfg.Conn, js: js, log: cfg.Log,
		replicas: cfg.Replicas, ackWait: orDefault(cfg.AckWait, DefaultAckWait),
		maxQueued: orDefault(cfg.MaxQueued, DefaultMaxQueued), maxTenant: orDefault(cfg.MaxTenant, DefaultMaxTenant), submits: cfg.Submits,
		heartbeat: orDefault(cfg.Heartbeat, DefaultHeartbeat),
		mendAfter: orDefault(cfg.MendAfter, DefaultMendAfter), patience: orDefault(cfg.Patience, DefaultPatience),
		abandoned: orDefault(cfg.Abandoned, DefaultAbandoned), reconciles: orDefault(cfg.Reconcile, DefaultReconcile),
		metrics: newMetrics(cfg.Registerer), id: newName(),
		poolIdle: orDefault(cfg.PoolIdle, DefaultPoolIdle), gap: make(chan struct{}),
	}
	c.view.init()
	c.holds.init()
	cfg.Conn.SetReconnectHandler(func(*nats.Conn) { c.missed() })
	return c, nil
}

func orDefault[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// Ready publishes to and receives from the broker, within ctx and one request's bound.
func (c *Client) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	if !c.nc.IsConnected() {
		return fmt.Errorf("%w: the connection to nats is %v: %w", ErrUnavailable, c.nc.Status(), orNone(c.nc.LastError()))
	}
	if _, err := c.js.AccountInfo(ctx); err != nil {
		return unavailable(err)
	}
	return nil
}

// orNone stands in for an error that the library does not remember.
func orNone(err error) error {
	if err == nil {
		return errors.New("no error yet")
	}
	return err
}

// missed wakes every watcher to read its record again: messages may have passed unseen.
func (c *Client) missed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.gap)
	c.gap = make(chan struct{})
}

// gapped returns a channel that is closed when messages may have been missed from now on.
func (c *Client) gapped() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gap
}

// unavailable wraps an error of a request so that callers can tell a broker that does not answer.
func unavailable(err error) error {
	if err == nil || errors.Is(err, ErrUnavailable) || errors.Is(err, context.Canceled) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// detach returns a context for finishing what ctx has started: it outlives ctx, but not bound.
func detach(ctx context.Context, bound time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(context.WithoutCancel(ctx), bound, ErrUnavailable) //nolint:forbidigo // the bounded helper itself
}

// pause waits before attempt+1: full jitter below an exponential bound of at most one second.
func pause(ctx context.Context, attempt int) error {
	bound := min(time.Second, 5*time.Millisecond<<min(attempt, 8))
	timer := time.NewTimer(time.Millisecond + rand.N(bound)) //nolint:gosec // jitter needs no secrecy
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
