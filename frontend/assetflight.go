package frontend

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

var (
	// errDownloads reports that as many downloads wait as are allowed.
	errDownloads = errors.New("too many downloads")
	// errAbandoned ends a download that nobody waits for any more.
	errAbandoned = fmt.Errorf("nobody waits for the download any more: %w", context.Canceled)
)

// maxAssetFlights bounds the downloads that run or wait to.
const maxAssetFlights = 1000

// assetFlights lets equal requests share one download. It runs in the call of whoever came first, under
// a context of its own, and ends when the last caller has cancelled. Callers that merely ran out of
// time leave it running: they come again for what it brings (row AST-8), and its own timeout ends it.
type assetFlights struct {
	mu      sync.Mutex              // guards all below and the flights' waiting
	open    map[string]*assetFlight // those that can be joined
	running map[*assetFlight]struct{}
	closed  bool
}

type assetFlight struct {
	waiting int
	cancel  context.CancelCauseFunc
	done    chan struct{} // closed when out and err are set
	out     assetOutcome
	err     error
}

func newAssetFlights() *assetFlights {
	return &assetFlights{open: make(map[string]*assetFlight), running: make(map[*assetFlight]struct{})}
}

// join takes part in the flight of this key, or makes it with fetch. The one who makes it returns when
// it has ended.
func (f *assetFlights) join(ctx context.Context, key string, fetch func(context.Context) (assetOutcome, error)) (assetOutcome, error) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return assetOutcome{}, errDraining
	}
	if flight := f.open[key]; flight != nil {
		flight.waiting++
		f.mu.Unlock()
		return f.wait(ctx, key, flight)
	}
	if len(f.running) >= maxAssetFlights {
		f.mu.Unlock()
		return assetOutcome{}, errDownloads
	}
	own, cancel := context.WithCancelCause(context.WithoutCancel(ctx)) //nolint:forbidigo // it ends with its last caller, its timeout or close
	flight := &assetFlight{waiting: 1, cancel: cancel, done: make(chan struct{}), err: errPanic}
	f.open[key], f.running[flight] = flight, struct{}{}
	f.mu.Unlock()
	defer context.AfterFunc(ctx, func() { f.leave(ctx, key, flight) })()
	defer func() {
		f.mu.Lock()
		if f.open[key] == flight {
			delete(f.open, key)
		}
		delete(f.running, flight)
		f.mu.Unlock()
		cancel(nil)
		close(flight.done)
	}()
	flight.out, flight.err = fetch(own)
	return flight.out, flight.err
}

func (f *assetFlights) wait(ctx context.Context, key string, flight *assetFlight) (assetOutcome, error) {
	select {
	case <-flight.done:
		return flight.out, flight.err
	case <-ctx.Done():
		f.leave(ctx, key, flight)
		return assetOutcome{}, context.Cause(ctx)
	}
}

// leave is a caller that does not wait any longer.
func (f *assetFlights) leave(ctx context.Context, key string, flight *assetFlight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	flight.waiting--
	if flight.waiting > 0 || outOfTime(ctx) {
		return
	}
	if f.open[key] == flight {
		delete(f.open, key) // Whoever comes now must not join what is about to end.
	}
	flight.cancel(errAbandoned)
}

// outOfTime tells a call whose time is up from one that was cancelled. A client whose time is up cancels
// as well, and the two arrive in any order.
func outOfTime(ctx context.Context) bool {
	const slack = 250 * time.Millisecond
	deadline, ok := ctx.Deadline()
	return ok && time.Until(deadline) < slack
}

// close ends all flights and waits for them.
func (f *assetFlights) close() {
	f.mu.Lock()
	f.closed = true
	var all []*assetFlight
	for flight := range f.running {
		flight.cancel(errDraining)
		all = append(all, flight)
	}
	f.mu.Unlock()
	for _, flight := range all {
		<-flight.done
	}
}
