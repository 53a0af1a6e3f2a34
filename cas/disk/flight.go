package disk

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// A flight is a fetch of one blob that everybody who asks for it shares. It has no goroutine and no
// context of its own: one caller at a time leads it, in its own call and under its own context. A
// leader whose context ends hands the baton on with what was fetched so far, and the next waiter
// goes on from there; so a fetch survives its first caller, ends with its last, and nobody is held
// up or failed by another caller's impatience (audit row 11). A detached goroutine under a context
// that the last waiter cancels does the same with more to go wrong.
type flight struct {
	// baton holds one token while nobody leads.
	baton chan struct{}
	// done is closed when the flight has landed; err is set before.
	done chan struct{}
	err  error
	// callers is who leads or waits; guarded by Tier.mu.
	callers int
	// part is what was fetched so far; it belongs to the holder of the baton.
	part *partial
}

// obtain returns the file of a variant, which may be deleted at any time after. held is false when
// the caller waited for a flight and has to ask again.
func (t *Tier) obtain(ctx context.Context, d digest.Digest, executable bool) (e entry, held bool, err error) {
	t.mu.Lock()
	k := t.keyOf(d, executable)
	e, held = t.index.use(k)
	if held && e.generation >= t.trusted && e.size == d.Size() {
		t.mu.Unlock()
		t.metrics.hits.Inc()
		return e, true, nil
	}
	f := t.flights[k.blob()]
	if f == nil {
		f = &flight{baton: make(chan struct{}, 1), done: make(chan struct{})}
		f.baton <- struct{}{} // The buffer is empty: this never waits.
		t.flights[k.blob()] = f
	}
	f.callers++
	t.mu.Unlock()
	t.metrics.misses.Inc()

	select {
	case <-f.done:
		return entry{}, false, f.err
	case <-ctx.Done():
		t.leave(ctx, f, k)
		return entry{}, false, context.Cause(ctx)
	case <-f.baton:
	}
	e, err = t.lead(ctx, f, k, d)
	if err != nil && ctx.Err() != nil {
		f.baton <- struct{}{} // The leader took the token out: this never waits.
		t.leave(ctx, f, k)
		return entry{}, false, fmt.Errorf("fetching %v: %w", d, context.Cause(ctx))
	}
	t.land(ctx, f, k, err)
	return e, err == nil, err
}

// lead fetches the blob within the bound on fetches.
func (t *Tier) lead(ctx context.Context, f *flight, k key, d digest.Digest) (entry, error) {
	select {
	case t.fetching <- struct{}{}:
		defer func() { <-t.fetching }()
	case <-ctx.Done():
		return entry{}, context.Cause(ctx)
	}
	if e, ok := t.convert(ctx, k, d); ok {
		return e, nil
	}
	e, err := t.fetch(ctx, f, k, d)
	if isFull(err) {
		// Somebody else has filled the disk: make room beyond the tier's own bound, once.
		t.mu.Lock()
		used := t.index.used + t.reserved
		t.mu.Unlock()
		low := used - max(2*cost(d.Size()), t.max/20)
		t.trim(ctx, low, low)
		if e, err = t.fetch(ctx, f, k, d); isFull(err) {
			err = fmt.Errorf("%w: %w", cas.ErrFull, err)
		}
	}
	return e, err
}

// land ends a flight with its result.
func (t *Tier) land(ctx context.Context, f *flight, k key, err error) {
	f.part.discard(ctx, t)
	f.part = nil
	f.err = err
	t.mu.Lock()
	delete(t.flights, k.blob())
	t.mu.Unlock()
	close(f.done)
}

// leave is a caller that gives up. The last one ends the flight.
func (t *Tier) leave(ctx context.Context, f *flight, k key) {
	t.mu.Lock()
	f.callers--
	last := f.callers == 0 && t.flights[k.blob()] == f
	if last {
		delete(t.flights, k.blob())
	}
	t.mu.Unlock()
	if last {
		f.part.discard(ctx, t)
	}
}

// partial is a file of tmp that grows to a blob, and the verdict on it so far.
type partial struct {
	file *os.File
	seen *cas.Verifier
	size int64 // what was reserved
	torn bool  // the file has not got what was seen
}

// Write implements io.Writer.
func (p *partial) Write(b []byte) (int, error) {
	if n, err := p.seen.Write(b); err != nil {
		p.torn = true
		return n, err
	}
	n, err := p.file.Write(b)
	p.torn = p.torn || err != nil
	return n, err
}

// begin reserves room and makes the file.
func (t *Tier) begin(ctx context.Context, d digest.Digest) (*partial, error) {
	t.reserve(ctx, d.Size())
	f, err := t.temp()
	if err != nil {
		t.release(d.Size())
		return nil, err
	}
	return &partial{file: f, seen: cas.NewVerifier(d), size: d.Size()}, nil
}

// discard deletes the file; p may be nil.
func (p *partial) discard(ctx context.Context, t *Tier) {
	if p == nil {
		return
	}
	if err := errors.Join(p.file.Close(), os.Remove(p.file.Name())); err != nil {
		t.log.ErrorContext(ctx, "temporary file cannot be deleted", "file", p.file.Name(), "err", err)
	}
	t.release(p.size)
}
