package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// A flight is a fetch of one blob that everybody who asks for it shares. It has no goroutine of its
// own: the callers take turns, and each turn brings the next bytes from the source into the file, in
// the call and under the context of who takes it. So the fetch goes as fast as its most eager caller,
// survives its first, ends with its last, and nobody is held up or failed by another's slow client
// or impatience (audit rows 11 and 18). A detached goroutine under a context that the last waiter
// cancels does the same with more to go wrong.
type flight struct {
	// baton holds one token while it is nobody's turn.
	baton chan struct{}
	// done is closed when the flight has landed; err is set before.
	done chan struct{}
	err  error
	// callers is who takes turns or waits; guarded by Tier.mu.
	callers int
	// ready is how many bytes of file may be read. All of them only when they have the digest.
	ready atomic.Int64
	file  *os.File // set before ready
	sum   uint32   // of the whole, set before ready is that

	part *partial // belongs to the holder of the baton
	from *feed    // belongs to the holder of the baton
	// resumed says that the source was opened again in the middle, so it has not verified the whole.
	resumed bool // belongs to the holder of the baton
}

// join returns the flight of a blob with the caller in it, made when there is none. t.mu must be held.
func (t *Tier) join(k key) *flight {
	f := t.flights[k.blob()]
	if f == nil {
		f = &flight{baton: make(chan struct{}, 1), done: make(chan struct{})}
		f.baton <- struct{}{} // The buffer is empty: this never waits.
		t.flights[k.blob()] = f
	}
	f.callers++
	t.metrics.misses.Inc()
	return f
}

// leave is the end of a caller's part in a flight. The last one ends a flight that has not landed.
func (t *Tier) leave(ctx context.Context, f *flight, k key) {
	t.mu.Lock()
	f.callers--
	last := f.callers == 0
	if last && t.flights[k.blob()] == f {
		delete(t.flights, k.blob())
	}
	t.mu.Unlock()
	if !last {
		return
	}
	f.from.close()
	switch {
	case f.part != nil:
		f.part.discard(ctx, t)
	case f.file != nil:
		f.file.Close() //nolint:errcheck // It was only read from.
	}
}

// land ends a flight with its result, which is the turn of whoever calls it.
func (t *Tier) land(f *flight, k key, err error) {
	f.err = err
	t.mu.Lock()
	delete(t.flights, k.blob())
	t.mu.Unlock()
	close(f.done)
}

// obtain returns the file of a variant, which may be deleted at any time after. held is false when
// the caller has to ask again.
func (t *Tier) obtain(ctx context.Context, d digest.Digest, executable bool) (e entry, held bool, err error) {
	t.mu.Lock()
	k := t.keyOf(d, executable)
	e, held = t.index.use(k)
	if held && e.generation >= t.trusted && e.size == d.Size() {
		t.mu.Unlock()
		t.metrics.hits.Inc()
		return e, true, nil
	}
	f := t.join(k)
	t.mu.Unlock()
	defer t.leave(ctx, f, k)
	for {
		select {
		case <-f.done:
			return entry{}, false, f.err
		case <-ctx.Done():
			return entry{}, false, fmt.Errorf("fetching %v: %w", d, context.Cause(ctx))
		case <-f.baton:
		}
		if f.part == nil {
			if e, ok := t.convert(ctx, k, d); ok {
				t.land(f, k, nil)
				return e, true, nil
			}
		}
		buf := t.buffers.get()
		_, e, err := t.turn(ctx, f, k, d, *buf)
		t.buffers.put(buf)
		if isFull(err) {
			err = fmt.Errorf("%w: %w", cas.ErrFull, err)
		}
		if err != nil || e.size != 0 {
			return e, err == nil, err
		}
	}
}

// turn brings at most len(buf) bytes into the file of the flight, and also leaves them in buf. The
// caller has the baton and loses it. The turn that completes the blob returns its entry.
func (t *Tier) turn(ctx context.Context, f *flight, k key, d digest.Digest, buf []byte) (n int, e entry, err error) {
	select {
	case t.fetching <- struct{}{}:
		defer func() { <-t.fetching }()
	case <-ctx.Done():
		f.baton <- struct{}{} // The caller took the token out: this never waits.
		return 0, entry{}, context.Cause(ctx)
	}
	n, err = t.bring(ctx, f, d, buf)
	if err != nil {
		f.from.close()
		f.from = nil
	}
	switch {
	case err != nil && ctx.Err() != nil:
		if p := f.part; p != nil && !p.torn && p.seen.Size() < d.Size() {
			f.ready.Store(p.seen.Size()) // The context may have ended as bytes came.
		}
		f.baton <- struct{}{}
		return 0, entry{}, context.Cause(ctx)
	case err != nil:
		t.land(f, k, err)
		return 0, entry{}, err
	case f.part.seen.Size() < d.Size():
		f.ready.Store(f.part.seen.Size())
		f.baton <- struct{}{}
		return n, entry{}, nil
	}
	f.sum = f.part.sum
	f.ready.Store(d.Size())
	if e, err = t.publish(ctx, f.part, k); err == nil {
		f.part = nil
	}
	t.land(f, k, err)
	return n, e, err
}

// bring reads the next bytes of the blob. The last ones are followed by the verdict.
func (t *Tier) bring(ctx context.Context, f *flight, d digest.Digest, buf []byte) (n int, err error) {
	if f.part == nil {
		if f.part, err = t.begin(ctx, d); err != nil {
			return 0, err
		}
		f.file = f.part.file
		if t.believe {
			f.part.seen = cas.NewLengthVerifier(d)
		}
	}
	if f.part.torn {
		return 0, &localError{errTorn}
	}
	at := f.part.seen.Size()
	if f.from == nil {
		if f.from, err = t.openFeed(ctx, d, at); err != nil {
			return 0, err
		}
		f.resumed = f.resumed || at > 0
	}
	if at < d.Size() {
		n, err = f.from.read(ctx, buf[:min(int64(len(buf)), d.Size()-at)])
		t.metrics.fetched.Add(float64(n))
		if _, err := f.part.Write(buf[:n]); err != nil {
			return 0, err
		}
		if err == nil && f.part.seen.Size() < d.Size() {
			return n, nil
		}
	}
	if err == nil {
		err = f.from.verdict(ctx)
	}
	if errors.Is(err, io.EOF) {
		err = f.verdict(d)
	}
	return n, err
}

// verdict tells whether the file is the blob, once the source has said so of what it has read.
func (f *flight) verdict(d digest.Digest) error {
	if !f.resumed || f.part.seen.Hashes() {
		return f.part.seen.Verdict()
	}
	whole := cas.NewVerifier(d)
	if _, err := io.Copy(whole, io.NewSectionReader(f.file, 0, d.Size())); err != nil {
		return &localError{err}
	}
	return whole.Verdict()
}

var errTorn = errors.New("a write of the file has failed")
