package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// refetches is how often a blob is fetched that was stored and is gone before it could be opened.
const refetches = 3

// fetch returns a blob that is absent here.
func (t *Tier) fetch(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	for range refetches {
		if _, err := t.client.can(d); err != nil {
			return nil, err
		}
		f, err := t.join(ctx, d)
		if err != nil {
			return nil, err
		}
		r, err := t.follow(ctx, f, offset)
		if !errors.Is(err, errGone) {
			return r, err
		}
	}
	return nil, fmt.Errorf("%w: %v is evicted as soon as it is stored", cas.ErrUnavailable, d)
}

// errGone reports a blob that was stored and is not there.
var errGone = errors.New("the blob was stored and is gone")

// follow reads a blob from its flight, or from the store when that has landed. It leaves the flight
// unless the reader that it returns does.
func (t *Tier) follow(ctx context.Context, f *flight, offset int64) (io.ReadCloser, error) {
	if tail := f.window.attach(offset); tail != nil {
		// The first bytes, or that there are none, so that an absent blob is an error of the call.
		data, err := f.window.next(ctx, tail)
		if err == nil || errors.Is(err, io.EOF) {
			return t.reader(ctx, f, tail, data, err), nil
		}
		f.window.detach(tail)
		if !errors.Is(err, errAside) {
			t.leave(f)
			return nil, err
		}
	}
	defer t.leave(f)
	return t.landed(ctx, f, offset)
}

// landed waits for the end of a flight and opens what it has stored.
func (t *Tier) landed(ctx context.Context, f *flight, offset int64) (io.ReadCloser, error) {
	select {
	case <-f.landed:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	switch {
	case errors.Is(f.err, errNotStored) && offset == 0:
		return t.client.Open(ctx, f.digest, 0)
	case errors.Is(f.err, errNotStored):
		// From the middle it could not be verified.
		return nil, fmt.Errorf("%w: %w", cas.ErrUnavailable, f.err)
	case f.err != nil:
		return nil, f.err
	}
	r, err := t.local.Open(ctx, f.digest, offset)
	if errors.Is(err, cas.ErrNotFound) {
		return nil, errGone
	}
	return r, err
}

// reader returns the reader of a flight that has read its first bytes.
func (t *Tier) reader(ctx context.Context, f *flight, at *tail, first []byte, err error) *reader {
	offset := f.window.position(at)
	r := &reader{data: first, err: err}
	r.next = func() ([]byte, error) {
		data, err := f.window.next(ctx, at)
		offset += int64(len(data))
		return data, err
	}
	r.rest = func() (io.ReadCloser, error) {
		rest, err := t.landed(ctx, f, offset)
		if errors.Is(err, errGone) {
			err = fmt.Errorf("%w: %v was evicted while it was read", cas.ErrUnavailable, f.digest)
		}
		return rest, err
	}
	r.leave = func() {
		f.window.detach(at)
		t.leave(f)
	}
	return r
}

// reader reads from a window, and from the store when it was set aside.
type reader struct {
	data  []byte
	err   error // sticky
	next  func() ([]byte, error)
	rest  func() (io.ReadCloser, error)
	leave func()
	tail  io.ReadCloser // from rest
	left  bool
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	for len(r.data) == 0 && r.err == nil && r.tail == nil && len(p) > 0 {
		r.fill()
	}
	if len(r.data) > 0 {
		n := copy(p, r.data)
		r.data = r.data[n:]
		return n, nil
	}
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	n, err := r.tail.Read(p)
	r.err = err
	return n, err
}

// WriteTo implements io.WriterTo.
func (r *reader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		for len(r.data) == 0 && r.err == nil && r.tail == nil {
			r.fill()
		}
		if len(r.data) > 0 {
			n, err := w.Write(r.data)
			total += int64(n)
			r.data = r.data[n:]
			if err != nil {
				return total, err
			}
			continue
		}
		if errors.Is(r.err, io.EOF) {
			return total, nil
		}
		if r.err != nil {
			return total, r.err
		}
		n, err := io.Copy(w, r.tail)
		if err == nil {
			r.err = io.EOF
		}
		return total + n, err
	}
}

func (r *reader) fill() {
	r.data, r.err = r.next()
	if errors.Is(r.err, errAside) {
		r.tail, r.err = r.rest()
	}
}

// Close implements io.Closer.
func (r *reader) Close() error {
	if r.left {
		return nil
	}
	r.left = true
	r.leave()
	if r.tail != nil {
		return r.tail.Close()
	}
	return nil
}
