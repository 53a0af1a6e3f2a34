package app

import (
	"context"
	"log/slog"
	"os"
	"runtime/debug"
)

// tuneMemory lets a process with a NATS server collect garbage less often: the server's block caches
// are only weakly held, so each collection makes it read them again (docs/PERFORMANCE.md). The
// user's own GOGC and GOMEMLIMIT win.
func tuneMemory(ctx context.Context, log *slog.Logger) {
	if os.Getenv("GOGC") != "" {
		return
	}
	debug.SetGCPercent(gcPercent)
	log.DebugContext(ctx, "garbage collection", "gogc", gcPercent)
}

const gcPercent = 400
