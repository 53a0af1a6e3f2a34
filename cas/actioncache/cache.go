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
	// MaxBytes bounds the bucket, 1 GiB by default, less where the broker has not that much.
	MaxBytes int64
	// MaxEntryBytes is up to which size a result is kept in the bucket itself, 900 KiB by default. It
	// must be below the broker's message limit.
	MaxEntryBytes int
	// Refresh is after which time an entry that is used is written again, a day by default.
	Refresh time.Duration
	Log     *slog.Logger
}

// Cache is the action cache. Its methods may be called concurrently.
type Cache struct {
	js       jetstream.JetStream
	stream   jetstream.Stream
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
)

// Open makes the bucket if there is none and brings its limits up to date.
func Open(ctx context.Context, cfg Config) (*Cache, error) {
	if cfg.Replicas == 0 {
		cfg.Replicas = 1
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = 1 << 30
	}
	if cfg.MaxEntryBytes == 0 {
		cfg.MaxEntryBytes = 900 << 10
	}
	if cfg.Refresh == 0 {
		cfg.Refresh = 24 * time.Hour
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
	return &Cache{js: js, stream: stream, blobs: cfg.Blobs, maxEntry: cfg.MaxEntryBytes, refresh: cfg.Refresh, log: cfg.Log}, nil
}

// minBytes is the smallest bucket that is made where the broker has no room to set MaxBytes aside.
const minBytes = 16 << 20

// openBucket makes or updates the stream: a key-value bucket as other clients know it, but that the
// oldest entries give way.
func openBucket(ctx context.Context, js jetstream.JetStream, cfg Config) (jetstream.Stream, error) { //nolint:ireturn // the library has no type for it
	for size := cfg.MaxBytes; ; size /= 4 {
		stream, err := createBucket(ctx, js, cfg.Replicas, size)
		if err == nil {
			return stream, nil
		}
		if err = failure(ctx, err); !errors.Is(err, cas.ErrFull) || size/4 < minBytes {
			return nil, err
		}
		cfg.Log.WarnContext(ctx, "the broker has little room for the action cache", "bytes", size/4, "err", err)
	}
}

func createBucket(ctx context.Context, js jetstream.JetStream, replicas int, size int64) (jetstream.Stream, error) { //nolint:ireturn // the library has no type for it
	return js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name:              "KV_" + bucket,
		Description:       "jetfarm action cache",
		Subjects:          []string{subjectPrefix + ">"},
		MaxMsgsPerSubject: 1,
		MaxBytes:          size,
		Discard:           jetstream.DiscardOld,
		Storage:           jetstream.FileStorage,
		Replicas:          replicas,
		Duplicates:        100 * time.Millisecond,
		AllowRollup:       true,
		AllowDirect:       true,
	})
}

// Get returns the result of an action. The error wraps ErrNotFound when there is none whose blobs
// are all present, cas.ErrUnavailable or another error of the blobs' store when that can't be told
// (row ACG-4). An entry that can't be understood is deleted and ErrNotFound (row ACG-9). The result
// is the caller's and has digests only, no inlined bytes (row ACG-5).
func (c *Cache) Get(ctx context.Context, action digest.Digest) (*repb.ActionResult, error) {
	stored, err := c.read(ctx, action)
	if err != nil {
		return nil, err
	}
	result, err := c.decode(ctx, action.Space(), stored.value)
	if err == nil {
		err = c.complete(ctx, action.Space(), result)
	}
	var missing *MissingError
	switch {
	case err == nil:
		c.touch(ctx, action, stored)
		return result, nil
	case errors.As(err, &missing):
		return nil, fmt.Errorf("%w for %v: %v", ErrNotFound, action, err) //nolint:errorlint // A miss is only a miss.
	case errors.Is(err, ErrTooLarge):
		c.log.WarnContext(ctx, "cached result is too large to be checked", "action", action, "err", err)
		return nil, fmt.Errorf("%w for %v: %v", ErrNotFound, action, err) //nolint:errorlint // A miss is only a miss.
	case errors.Is(err, ErrInvalid):
		c.log.ErrorContext(ctx, "damaged cached result is deleted", "action", action, "err", err)
		c.remove(ctx, action, stored)
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
	if err := c.complete(ctx, action.Space(), result); err != nil {
		return err
	}
	value, err := c.encode(ctx, action.Space(), result)
	if err != nil {
		return err
	}
	if err := c.write(ctx, action, value); err != nil {
		return fmt.Errorf("storing the result of %v: %w", action, err)
	}
	return nil
}
