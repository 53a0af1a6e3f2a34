package objectstore

import (
	"errors"
	"fmt"
	"log/slog"
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
	// RequestTimeout bounds one request to the broker; 5 s by default.
	RequestTimeout time.Duration
	// StallTimeout bounds the silence of the broker within a transfer; 10 s by default. A transfer
	// that moves has no other bound than its context.
	StallTimeout time.Duration
	// WriteBudget bounds the bytes that this Store has sent to one stream and that are not yet
	// acknowledged; 64 MiB by default. The broker drops what exceeds its own bound of 128 MiB.
	WriteBudget int64
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
	var errs []error
	if c.Small == nil || c.Bulk == nil {
		errs = append(errs, errors.New("objectstore: both connections are needed"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("objectstore: a logger is needed"))
	}
	if c.Replicas < 1 || c.Replicas > 5 {
		errs = append(errs, fmt.Errorf("objectstore: %d replicas, 1 to 5 are possible", c.Replicas))
	}
	if c.MaxBytes < 0 || c.RequestTimeout < 0 || c.StallTimeout < 0 {
		errs = append(errs, errors.New("objectstore: a negative bound"))
	}
	if c.WriteBudget < chunkSize {
		errs = append(errs, fmt.Errorf("objectstore: a write budget of %d bytes, at least one chunk of %d is needed", c.WriteBudget, chunkSize))
	}
	return c, errors.Join(errs...)
}
