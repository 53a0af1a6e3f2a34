package upstream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// abilities are what an upstream said that it can do.
type abilities struct {
	functions map[digest.Function]bool
	batch     int64 // most bytes of the blobs of a batch
	blob      int64 // most bytes of a blob
	zstd      bool  // of ByteStream transfers and of what is read in batches
	zstdBatch bool  // of what is written in batches
	updates   bool  // of the action cache
}

// compressor is the form in which ByteStream transfers travel.
func (a *abilities) compressor() digest.Compressor {
	if a.zstd {
		return digest.Zstd
	}
	return digest.Identity
}

// The bytes of the blobs of one batch, whatever more the upstream would take: a message must come
// through a slow line within the bound on stalls.
const maxBatch = 1 << 20

func abilitiesOf(c *repb.CacheCapabilities) *abilities {
	a := &abilities{
		functions: make(map[digest.Function]bool), batch: maxBatch, blob: 1 << 62,
		updates: c.GetActionCacheUpdateCapabilities().GetUpdateEnabled(),
	}
	for _, f := range c.GetDigestFunctions() {
		a.functions[digest.Function(f)] = true //nolint:gosec // an enum of small numbers
	}
	if len(a.functions) == 0 {
		a.functions[digest.SHA256] = true
	}
	if n := c.GetMaxBatchTotalSizeBytes(); n > 0 {
		a.batch = min(n, maxBatch)
	}
	if n := c.GetMaxCasBlobSizeBytes(); n > 0 {
		a.blob = n
	}
	for _, z := range c.GetSupportedCompressors() {
		a.zstd = a.zstd || z == repb.Compressor_ZSTD
	}
	for _, z := range c.GetSupportedBatchUpdateCompressors() {
		a.zstdBatch = a.zstdBatch || z == repb.Compressor_ZSTD
	}
	return a
}

// trip is how many calls or probes must fail one after the other for the upstream to count as down.
// Those that a single event ends, such as a connection that breaks, count as one.
const trip = 3

// health is a circuit breaker: an upstream that fails is left alone until a probe succeeds, so that a
// dead one costs a few calls their time and not all of them. It starts out down.
type health struct {
	wake chan struct{} // tells Run of failures

	mu       sync.Mutex // guards the rest
	can      *abilities // nil while down
	failures int        // in a row
	failed   time.Time  // the last that counted
	strikes  int        // how often it went down without a success since
}

// able returns what the upstream can do, or ErrDown.
func (h *health) able() (*abilities, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.can == nil {
		return nil, ErrDown
	}
	return h.can, nil
}

// report takes the outcome of a call that waited for the upstream since begun, and tells whether the
// upstream went down with it.
func (h *health) report(ok bool, begun time.Time) (wentDown bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if ok {
		h.failures, h.strikes = 0, 0
		return false
	}
	return h.fail(begun)
}

// fail counts a failure. h.mu must be held.
func (h *health) fail(begun time.Time) (wentDown bool) {
	if begun.Before(h.failed) {
		return false
	}
	h.failed = time.Now()
	select {
	case h.wake <- struct{}{}:
	default:
	}
	if h.failures++; h.failures < trip || h.can == nil {
		return false
	}
	h.can = nil
	h.strikes++
	return true
}

// learned takes the outcome of a probe and tells whether the upstream went up or down with it. When
// it was down, one more failure is enough to go down again.
func (h *health) learned(can *abilities, err error, begun time.Time) (changed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	was := h.can != nil
	switch {
	case err != nil && was:
		return h.fail(begun)
	case err != nil:
		h.strikes++
		return false
	case !was && h.strikes > 0:
		h.failures = trip - 1
	}
	h.can = can
	return !was
}

// pause is how long to wait before the next probe.
func (h *health) pause(cfg Config) time.Duration {
	const longest = 30 * time.Second
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.can != nil && h.failures > 0:
		return cfg.Probe
	case h.can != nil:
		return cfg.Relearn
	}
	wait := cfg.Probe << min(max(h.strikes-1, 0), 8)
	wait = min(wait, max(longest, cfg.Probe))
	return wait/2 + rand.N(wait/2+1) //nolint:gosec // only to spread the probes of several processes
}

// probeBound is how long a probe may take, unless the bound on stalls is shorter.
const probeBound = 5 * time.Second

// learn asks for the capabilities. It is the probe of the upstream's health as well.
func (c *Client) learn(ctx context.Context) error {
	begun := time.Now()
	bound, cancel := context.WithTimeoutCause(c.outgoing(ctx), min(c.cfg.Stall, probeBound), errStalled)
	defer cancel()
	answer, err := c.capabilities.GetCapabilities(bound, &repb.GetCapabilitiesRequest{InstanceName: c.cfg.Endpoint.Instance})
	c.count("GetCapabilities", err)
	err = failure(ctx, bound, err)
	if err != nil && ctx.Err() != nil {
		return err
	}
	var can *abilities
	if err == nil {
		if cache := answer.GetCacheCapabilities(); cache != nil {
			can = abilitiesOf(cache)
		} else {
			err = fmt.Errorf("%w: it is no cache", ErrRefused)
		}
	}
	switch {
	case !c.health.learned(can, err, begun):
	case err == nil:
		c.cfg.Log.InfoContext(ctx, "upstream cache is up", "address", c.cfg.Endpoint.Address, "zstd", can.zstd, "action_cache_updates", can.updates)
	default:
		c.cfg.Log.WarnContext(ctx, "upstream cache is down", "address", c.cfg.Endpoint.Address, "err", err)
	}
	return err
}

// Run probes the upstream while it is down and asks for its capabilities now and then while it is up.
// It returns nil when ctx ends.
func (c *Client) Run(ctx context.Context) error {
	var last time.Time // of the last probe
	for {
		wait := c.health.pause(c.cfg)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-c.health.wake:
			timer.Stop()
			if _, err := c.health.able(); err != nil || time.Since(last) < c.cfg.Probe {
				continue
			}
		}
		last = time.Now()
		if err := c.learn(ctx); err != nil && !errors.Is(err, cas.ErrUnavailable) && ctx.Err() == nil {
			c.cfg.Log.DebugContext(ctx, "upstream cache was probed", "err", err)
		}
	}
}

// done takes the outcome of a call that waited since begun and has returned err after failure.
func (c *Client) done(ctx context.Context, begun time.Time, err error) error {
	if ctx.Err() == nil && c.health.report(alive(err), begun) {
		c.cfg.Log.WarnContext(ctx, "upstream cache is down", "address", c.cfg.Endpoint.Address, "err", err)
	}
	return err
}
