package actioncache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// The errors of a Cache, besides cas.ErrUnavailable, cas.ErrFull and what the store of the blobs
// says.
var (
	// ErrNotFound reports an action without a complete result.
	ErrNotFound = errors.New("no cached result")
	// ErrInvalid reports a result that no action can have. The text says which field is wrong.
	ErrInvalid = errors.New("invalid action result")
)

// Results is an action cache: a Cache, or what wraps one. Get and Put are as those of a Cache.
type Results interface {
	Get(ctx context.Context, action digest.Digest) (*repb.ActionResult, error)
	Put(ctx context.Context, action digest.Digest, result *repb.ActionResult) error
}

var _ Results = (*Cache)(nil)

// MissingError reports a result that names blobs the CAS does not have.
type MissingError struct {
	// Missing is not empty and may not be complete: what is named by an absent blob is not known.
	Missing []digest.Digest
}

// Error names the first blob.
func (e *MissingError) Error() string {
	return fmt.Sprintf("%d blobs of the action result are missing, the first is %v", len(e.Missing), e.Missing[0])
}

// Config is what Open needs.
type Config struct {
	Conn *nats.Conn
	// Blobs has what the results name.
	Blobs cas.Store
	// Replicas is in how many brokers a result is kept, 1 by default.
	Replicas int
	// MaxBytes bounds the bucket, less where the broker has not that much. 0 keeps the bound of a
	// bucket that is there and is 1 GiB for a new one.
	MaxBytes int64
	// MaxEntryBytes is up to which size a result is kept in the bucket itself, 900 KiB by default. It
	// must be below the broker's message limit.
	MaxEntryBytes int
	// Refresh is after which time an entry that is used is written again, a day by default.
	Refresh time.Duration
	// MemoryBytes bounds the entries that are kept in memory while Run runs; 0 keeps none.
	MemoryBytes int64
	// MemoryAge is how long an entry is kept in memory before the broker is asked again, a minute by
	// default.
	MemoryAge time.Duration
	Log       *slog.Logger
	// Registerer receives the metrics of the memory; nil keeps them private.
	Registerer prometheus.Registerer
}

// Cache is the action cache. Its methods may be called concurrently.
type Cache struct {
	conn     *nats.Conn
	js       jetstream.JetStream
	stream   jetstream.Stream
	memory   *memory // nil for none
	blobs    cas.Store
	maxEntry int
	refresh  time.Duration
	log      *slog.Logger
}

const (
	bucket = "ac-1"
	// requestTimeout bounds each request to the broker.
	requestTimeout = 5 * time.Second
	// maxResult bounds a result that is kept as a blob.
	maxResult = 64 << 20
	// defaultBytes bounds a new bucket.
	defaultBytes = 1 << 30
)

// Open makes the bucket if there is none and brings its limits up to date.
func Open(ctx context.Context, cfg Config) (*Cache, error) {
	if cfg.Replicas == 0 {
		cfg.Replicas = 1
	}
	if cfg.MaxEntryBytes == 0 {
		cfg.MaxEntryBytes = 900 << 10
	}
	if cfg.Refresh == 0 {
		cfg.Refresh = 24 * time.Hour
	}
	if cfg.MemoryAge == 0 {
		cfg.MemoryAge = time.Minute
	}
	js, err := jetstream.New(cfg.Conn)
	if err != nil {
		return nil, fmt.Errorf("action cache: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*requestTimeout, errNoAnswer)
	defer cancel()
	stream, err := openBucket(ctx, js, cfg)
	if err != nil {
		return nil, fmt.Errorf("action cache: bucket %s: %w", bucket, err)
	}
	c := &Cache{
		conn: cfg.Conn, js: js, stream: stream, blobs: cfg.Blobs,
		maxEntry: cfg.MaxEntryBytes, refresh: cfg.Refresh, log: cfg.Log,
	}
	if cfg.MemoryBytes > 0 {
		c.memory = newMemory(cfg.MemoryBytes, cfg.MemoryAge)
		if err := c.memory.register(cfg.Registerer); err != nil {
			return nil, fmt.Errorf("action cache: %w", err)
		}
	}
	return c, nil
}

// Get returns the result of an action. The error wraps ErrNotFound when there is none whose blobs
// are all present, cas.ErrUnavailable or another error of the blobs' store when that can't be told
// (row ACG-4). An entry that can't be understood is deleted and ErrNotFound (row ACG-9). The result
// is the caller's and has digests only, no inlined bytes (row ACG-5).
//
// What this process has Put is seen at once. With Run, what another process has Put is seen as soon
// as its news arrive, which the broker sends before it acknowledges the Put.
func (c *Cache) Get(ctx context.Context, action digest.Digest) (*repb.ActionResult, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	asked := time.Now()
	k, epoch := c.kept(action, asked)
	var result *repb.ActionResult
	var err error
	if k != nil {
		result, err = c.again(ctx, k)
	} else {
		if k, err = c.read(ctx, action); err != nil {
			return nil, err
		}
		if result, err = c.open(ctx, action.Space(), k); err == nil {
			c.keep(action, k, epoch, asked)
		}
	}
	var missing *MissingError
	switch {
	case err == nil:
		c.touch(ctx, action, k)
		return result, nil
	case errors.As(err, &missing):
		return nil, fmt.Errorf("%w for %v: %v", ErrNotFound, action, err) //nolint:errorlint // A miss is only a miss.
	case errors.Is(err, ErrTooLarge):
		c.log.WarnContext(ctx, "cached result is too large to be checked", "action", action, "err", err)
		return nil, fmt.Errorf("%w for %v: %v", ErrNotFound, action, err) //nolint:errorlint // A miss is only a miss.
	case errors.Is(err, ErrInvalid):
		c.log.ErrorContext(ctx, "damaged cached result is deleted", "action", action, "err", err)
		c.remove(ctx, action, k)
		return nil, fmt.Errorf("%w for %v: the entry was damaged", ErrNotFound, action)
	default:
		return nil, fmt.Errorf("checking the result of %v: %w", action, err)
	}
}

// Put stores the result of an action in place of an earlier one. Bytes in the result are moved into
// the CAS. The error wraps ErrInvalid for a result that is not well formed, or is a *MissingError
// when it names blobs that are absent; then nothing has changed.
func (c *Cache) Put(ctx context.Context, action digest.Digest, result *repb.ActionResult) error {
	if result == nil {
		return fmt.Errorf("%w: there is none", ErrInvalid)
	}
	result = proto.CloneOf(result)
	if err := c.strip(ctx, action.Space(), result); err != nil {
		return err
	}
	n := c.names(action.Space())
	if err := n.complete(ctx, result); err != nil {
		return err
	}
	k, err := c.encode(ctx, n, result)
	if err != nil {
		return err
	}
	k.written = time.Now()
	_, epoch := c.kept(action, k.written)
	if k.sequence, err = c.write(ctx, action, k.value); err != nil {
		c.doubt(action)
		return fmt.Errorf("storing the result of %v: %w", action, err)
	}
	c.keep(action, k, epoch, k.written)
	return nil
}
