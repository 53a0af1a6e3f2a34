package objectstore

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
)

// Config says how a Store reaches its buckets. The zero value of a field with a default means the
// default.
//
// The connections should have a nats.FlusherTimeout of a few seconds: it is what bounds a publish
// to a peer that stopped reading, which no context can interrupt. They are closed by their owner,
// after every call on the Store has returned.
type Config struct {
	// Small carries blobs of at most 512 KiB, listings and announcements.
	Small *nats.Conn
	// Bulk carries larger blobs. It may be the same connection where latency does not matter.
	Bulk *nats.Conn
	// Replicas of the streams made here; 1 by default.
	Replicas int
	// MaxBytes bounds each stream made here; 0 is no bound.
	MaxBytes int64
	// Maintain makes this Store take part in keeping the generations: one of those that do rotates,
	// drops and cleans up, as long as its Run goes on.
	Maintain bool
	// MaxSize is the most bytes of all streams; 0 is what TellDisk says the broker has to offer, and no
	// bound where nothing says so.
	MaxSize int64
	// MaxBlobs is about the most blobs, since each takes memory of the broker and of this process; 10
	// million by default.
	MaxBlobs int64
	// Retention is how long a blob that was reported present stays at least. Where that leaves no room,
	// uploads are refused with cas.ErrFull. 0 promises nothing in time, only in bytes: see doc.go.
	Retention time.Duration
	// MaxAge is after which time a generation that has blobs is followed by a new one; 24 h by default.
	MaxAge time.Duration
	// OrphanAge is for how long chunks of an upload that broke off are kept; 1 h by default.
	OrphanAge time.Duration
	// RequestTimeout bounds one request to the broker; 5 s by default.
	RequestTimeout time.Duration
	// StallTimeout bounds the silence of the broker within a transfer; 10 s by default. A transfer
	// that moves has no other bound than its context.
	StallTimeout time.Duration
	// WriteBudget bounds the bytes that this Store has sent to one stream and that are not yet
	// acknowledged; 64 MiB by default. The broker drops what exceeds its own bound of 128 MiB.
	WriteBudget int64
	// Compression says what is stored compressed; nothing by default.
	Compression Compression
	// Log is never nil.
	Log *slog.Logger
	// Registerer receives the metrics; nil keeps them private.
	Registerer prometheus.Registerer
}

func (c Config) withDefaults() (Config, error) {
	if c.Replicas == 0 {
		c.Replicas = 1
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = 5 * time.Second
	}
	if c.StallTimeout == 0 {
		c.StallTimeout = 10 * time.Second
	}
	if c.WriteBudget == 0 {
		c.WriteBudget = 64 << 20
	}
	if c.MaxBlobs == 0 {
		c.MaxBlobs = 10_000_000
	}
	if c.MaxAge == 0 {
		c.MaxAge = 24 * time.Hour
	}
	if c.OrphanAge == 0 {
		c.OrphanAge = time.Hour
	}
	if c.Compression == "" {
		c.Compression = CompressNothing
	}
	var errs []error
	if !slices.Contains(Compressions(), c.Compression) {
		errs = append(errs, fmt.Errorf("objectstore: compression %q, possible are %q", c.Compression, Compressions()))
	}
	if c.Small == nil || c.Bulk == nil {
		errs = append(errs, errors.New("objectstore: both connections are needed"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("objectstore: a logger is needed"))
	}
	if c.Replicas < 1 || c.Replicas > 5 {
		errs = append(errs, fmt.Errorf("objectstore: %d replicas, 1 to 5 are possible", c.Replicas))
	}
	if c.MaxSize < 0 || c.MaxBlobs < 0 || c.Retention < 0 || c.MaxAge < 0 || c.OrphanAge < 0 || c.MaxBytes < 0 || c.RequestTimeout < 0 || c.StallTimeout < 0 {
		errs = append(errs, errors.New("objectstore: a negative bound"))
	}
	if c.WriteBudget < chunkSize {
		errs = append(errs, fmt.Errorf("objectstore: a write budget of %d bytes, at least one chunk of %d is needed", c.WriteBudget, chunkSize))
	}
	return c, errors.Join(errs...)
}
