package app

import (
	"context"
	"log/slog"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// A process with a NATS server collects garbage less often than Go does by itself: the server's block
// caches are only weakly held, so each collection makes it read them again (docs/PERFORMANCE.md). With
// many blobs that would be several GiB of garbage, of which each collection takes no less time because
// there is more of it. So the garbage is bounded as well.
const (
	mostPercent  = 400
	leastPercent = 50
	mostGarbage  = 512 << 20

	tuneEvery = time.Second
	liveHeap  = "/gc/heap/live:bytes"
)

// tuneMemory is how a process with a NATS server collects garbage until ctx ends. The user's own GOGC
// wins.
func tuneMemory(log *slog.Logger) func(ctx context.Context) error {
	tune := os.Getenv("GOGC") == ""
	if tune {
		debug.SetGCPercent(mostPercent)
	}
	return func(ctx context.Context) error {
		tick := time.NewTicker(tuneEvery)
		defer tick.Stop()
		sample := []metrics.Sample{{Name: liveHeap}}
		for before := mostPercent; ; {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil
			}
			metrics.Read(sample)
			if percent := gcPercent(sample[0].Value.Uint64()); tune && percent != before {
				debug.SetGCPercent(percent)
				log.DebugContext(ctx, "garbage collection", "gogc", percent)
				before = percent
			}
		}
	}
}

// gcPercent is GOGC for so many live bytes, in steps of 10.
func gcPercent(live uint64) int {
	percent := uint64(mostPercent)
	if live > 0 {
		percent = mostGarbage * 100 / live / 10 * 10
	}
	return int(min(max(percent, leastPercent), mostPercent))
}
