package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// A flight is the fetch of one blob that everybody who asks for it shares. It belongs to Tier.Run and
// not to a caller, so that it survives its first one; it is cancelled when its last one leaves
// (audit rows 11 and 18).
type flight struct {
	digest digest.Digest
	window *window
	cancel context.CancelCauseFunc
	// landed is closed when the blob is stored or will not be; err is set before.
	landed chan struct{}
	err    error
	// callers is who reads or waits; guarded by Tier.mu.
	callers int
}

var (
	errAbandoned = errors.New("nobody wants the blob any more")
	errEnded     = fmt.Errorf("%w: the process ends", cas.ErrUnavailable)
	// errNotStored reports a blob that the upstream has and the farm's own store did not take.
	errNotStored = errors.New("the blob could not be stored")
)

// join enters the flight of a blob, which it starts when there is none. The caller must leave.
func (t *Tier) join(ctx context.Context, d digest.Digest) (*flight, error) {
	select {
	case <-t.started:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.launch == nil {
		return nil, errEnded
	}
	f := t.flights[d]
	if f == nil {
		f = &flight{digest: d, window: newWindow(t.patience), landed: make(chan struct{})}
		t.flights[d] = f
		t.launch(f)
	}
	f.callers++
	return f, nil
}

// leave is the end of what join began. A blob that is whole is stored even when nobody waits for it.
func (t *Tier) leave(f *flight) {
	whole := f.window.whole()
	t.mu.Lock()
	f.callers--
	last := f.callers == 0 && t.flights[f.digest] == f && !whole
	if last {
		delete(t.flights, f.digest)
	}
	t.mu.Unlock()
	if last {
		f.cancel(errAbandoned)
	}
}

// fly is a flight from its start to its end.
func (t *Tier) fly(ctx context.Context, f *flight) {
	err := t.carry(ctx, f)
	if ctx.Err() != nil && err != nil {
		err = context.Cause(ctx)
	}
	t.client.metrics.fetches.WithLabelValues(outcome(err)).Inc()
	f.window.finish(err)
	f.err = err
	t.mu.Lock()
	if t.flights[f.digest] == f {
		delete(t.flights, f.digest)
	}
	t.mu.Unlock()
	close(f.landed)
}

// carry brings the blob from the upstream into the store.
func (t *Tier) carry(ctx context.Context, f *flight) error {
	select {
	case t.fetching <- struct{}{}:
		defer func() { <-t.fetching }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// Somebody may have stored it between the miss and this flight.
	if missing, err := t.local.Missing(ctx, []digest.Digest{f.digest}); err == nil && len(missing) == 0 {
		f.window.aside()
		return nil
	}
	from := &resuming{client: t.client, digest: f.digest}
	from.open = func(offset int64) (io.ReadCloser, error) { return t.client.open(ctx, f.digest, offset) }
	defer from.close()
	source := &passing{source: cas.Verify(from, f.digest), pass: func(p []byte) {
		if slow := f.window.write(ctx, p); slow > 0 {
			t.client.metrics.aside.Add(float64(slow))
		}
	}, finish: f.window.finish}
	stored := t.local.Put(ctx, f.digest, source)
	switch {
	case source.err != nil && !errors.Is(source.err, io.EOF):
		return source.err
	case stored == nil && source.err == nil:
		// Somebody else has stored it meanwhile.
		f.window.aside()
		return nil
	case stored == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	t.log.WarnContext(ctx, "blob of the upstream cache cannot be stored", "blob", f.digest, "err", stored)
	// Those who read it get it all the same.
	buffer := make([]byte, copyBytes)
	for source.err == nil && f.window.wanted() {
		_, _ = source.Read(buffer) //nolint:errcheck // source.err has it
	}
	if source.err != nil && !errors.Is(source.err, io.EOF) {
		return source.err
	}
	return fmt.Errorf("%w: %w", errNotStored, stored)
}

// passing is the source of a flight that passes on what is read.
type passing struct {
	source io.Reader
	pass   func(p []byte)
	finish func(err error)
	err    error // sticky
}

// Read implements io.Reader.
func (p *passing) Read(b []byte) (int, error) {
	if p.err != nil {
		return 0, p.err
	}
	n, err := p.source.Read(b)
	if n > 0 {
		p.pass(b[:n])
	}
	if p.err = err; errors.Is(err, io.EOF) {
		p.finish(nil)
	}
	return n, err
}

// resuming reads a blob of the upstream and goes on where it was when the transfer breaks off.
type resuming struct {
	client *Client
	digest digest.Digest
	open   func(offset int64) (io.ReadCloser, error)
	now    io.ReadCloser // nil before the first read
	at     int64
	broken int64 // where it broke off the last time
	tries  int   // how often it broke off there
}

// maxTries is how often a transfer is taken up again at the same place.
const maxTries = 2

// Read implements io.Reader.
func (r *resuming) Read(p []byte) (int, error) {
	for {
		n, err := r.read(p)
		r.at += int64(n)
		if n > 0 || !errors.Is(err, cas.ErrUnavailable) || errors.Is(err, ErrDown) || errors.Is(err, ErrRefused) {
			if n > 0 && !errors.Is(err, io.EOF) {
				err = nil // it comes again
			}
			return n, err
		}
		if r.at > r.broken {
			r.broken, r.tries = r.at, 0
		}
		if r.tries++; r.tries > maxTries || r.at == 0 {
			return 0, err
		}
		r.client.metrics.resumed.Inc()
		r.close()
	}
}

func (r *resuming) read(p []byte) (int, error) {
	if r.now == nil {
		now, err := r.open(r.at)
		if err != nil {
			return 0, err
		}
		r.now = now
	}
	return r.now.Read(p)
}

func (r *resuming) close() {
	if r.now != nil {
		_ = r.now.Close()
		r.now = nil
	}
}
