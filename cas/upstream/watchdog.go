package upstream

import (
	"context"
	"time"
)

// A watchdog ends the context of a stream when the upstream lets this side wait too long for one
// message. Time that this side spends otherwise does not count, so that neither a slow reader nor a
// slow writer of the farm is taken for a stalled upstream, and a slow transfer lives on.
type watchdog struct {
	timer *time.Timer
	bound time.Duration
	begun time.Time // when the last wait began
}

// watch returns a context for a stream and its watchdog, which sleeps. The caller ends both with
// cancel.
func watch(ctx context.Context, bound time.Duration) (_ context.Context, w *watchdog, cancel context.CancelCauseFunc) {
	ctx, end := context.WithCancelCause(ctx)
	w = &watchdog{bound: bound, timer: time.AfterFunc(bound, func() { end(errStalled) })}
	w.timer.Stop()
	return ctx, w, func(cause error) {
		w.timer.Stop()
		end(cause)
	}
}

// wait calls f, which waits for the upstream.
func (w *watchdog) wait(f func() error) error {
	w.begun = time.Now()
	w.timer.Reset(w.bound)
	defer w.timer.Stop()
	return f()
}
