package worker

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// Config is what New needs. Zero durations and sizes mean the defaults.
type Config struct {
	// Name is what results and the registry call this worker.
	Name string
	// Dir is the worker's own directory for running actions. It should be on the file system of Disk,
	// so that inputs can be hard links. It is made when it does not exist.
	Dir string
	// Concurrency is how many actions run at once; 0 is one for each processor.
	Concurrency int
	// Platform is what the worker offers. The queue matches jobs by it.
	Platform broker.Platform
	// Isolation is a sandbox.Mode; "" is auto.
	Isolation string
	// DrainTimeout is how long running jobs may go on after Run's context ended.
	DrainTimeout time.Duration
	// MaxTimeout is the longest timeout that an action may ask for, 24 h by default, DefaultTimeout the
	// one of an action that asks for none, 1 h by default.
	MaxTimeout, DefaultTimeout time.Duration
	// FetchTimeout bounds reading and laying out the inputs of one action, UploadTimeout collecting and
	// uploading its outputs; 15 min by default.
	FetchTimeout, UploadTimeout time.Duration
	// Grace is how much longer than all its timeouts an attempt may take before the farm takes it from this
	// worker, and how long a job may go on whose lease is over before the worker is out of order; 5 min by
	// default.
	Grace time.Duration
	// MaxLog bounds standard output and standard error, each, in bytes; 64 MiB by default. An action
	// that writes more is killed.
	MaxLog int64
	// Queue is where jobs come from. Its Run must outlive the worker's.
	Queue *broker.Queue
	// Blobs is where outputs go, Disk where inputs come from, and Actions the action cache.
	Blobs   cas.Store
	Disk    *disk.Tier
	Actions *actioncache.Cache
	Log     *slog.Logger
	// Registerer gets the metrics; nil is none.
	Registerer prometheus.Registerer
}

const (
	defaultMaxTimeout = 24 * time.Hour
	defaultTimeout    = time.Hour
	defaultStage      = 15 * time.Minute
	defaultGrace      = 5 * time.Minute
	defaultMaxLog     = 64 << 20
)

func (c *Config) complete() error {
	if c.Concurrency == 0 {
		c.Concurrency = runtime.GOMAXPROCS(0)
	}
	if c.Isolation == "" {
		c.Isolation = string(sandbox.ModeAuto)
	}
	for _, d := range []struct {
		value    *time.Duration
		standard time.Duration
	}{
		{&c.MaxTimeout, defaultMaxTimeout},
		{&c.FetchTimeout, defaultStage},
		{&c.UploadTimeout, defaultStage},
		{&c.Grace, defaultGrace},
	} {
		if *d.value == 0 {
			*d.value = d.standard
		}
	}
	if c.DefaultTimeout == 0 {
		c.DefaultTimeout = min(defaultTimeout, c.MaxTimeout)
	}
	if c.MaxLog == 0 {
		c.MaxLog = defaultMaxLog
	}
	switch {
	case c.Name == "":
		return errors.New("the worker has no name")
	case c.Dir == "":
		return errors.New("the worker has no directory")
	case c.DefaultTimeout > c.MaxTimeout:
		return fmt.Errorf("default timeout %v is longer than the maximum %v", c.DefaultTimeout, c.MaxTimeout)
	case c.DrainTimeout < 0:
		return fmt.Errorf("drain timeout %v is negative", c.DrainTimeout)
	}
	return nil
}
