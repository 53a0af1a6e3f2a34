package frontend

import (
	"context"
	"sync"
)

// waiters knows the streams that follow an operation, so that a draining frontend can end them: their
// operations go on, and clients take them up again on another frontend.
type waiters struct {
	mu      sync.Mutex
	ended   error // guarded by mu; why no stream may enter any more
	streams map[*context.CancelCauseFunc]struct{}
}

func newWaiters() *waiters {
	return &waiters{streams: make(map[*context.CancelCauseFunc]struct{})}
}

// enter registers a stream. Its context ends with the cause given to end. The caller calls leave when
// the stream is over. The error is that of refuse or end.
func (w *waiters) enter(ctx context.Context) (_ context.Context, leave func(), _ error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended != nil {
		return nil, nil, w.ended
	}
	ctx, cancel := context.WithCancelCause(ctx)
	key := &cancel
	w.streams[key] = struct{}{}
	return ctx, func() {
		w.mu.Lock()
		delete(w.streams, key)
		w.mu.Unlock()
		cancel(context.Canceled)
	}, nil
}

// refuse keeps further streams from entering.
func (w *waiters) refuse(cause error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = cause
}

// end ends the streams that are there.
func (w *waiters) end(cause error) {
	w.mu.Lock()
	cancels := make([]context.CancelCauseFunc, 0, len(w.streams))
	for key := range w.streams {
		cancels = append(cancels, *key)
	}
	w.mu.Unlock()
	for _, cancel := range cancels {
		cancel(cause)
	}
}

// count is the number of streams.
func (w *waiters) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.streams)
}
