package objectstore

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/jetfarm/jetfarm/cas"
)

// sourceError is an error of the client's reader, which Put returns as it is.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

// source reads what a client puts. An error of the client's reader is a sourceError.
type source struct {
	r     io.Reader
	ended bool // r has returned io.EOF
	total int64
}

// maxEmptyReads is how often a reader may return nothing in a row.
const maxEmptyReads = 100

// fill reads len(p) bytes. An earlier end is cas.ErrMismatch.
func (s *source) fill(ctx context.Context, p []byte) error {
	for empty := 0; len(p) > 0; {
		if ctx.Err() != nil {
			return ended(ctx)
		}
		if s.ended {
			return fmt.Errorf("%w: it ends after %d bytes", cas.ErrMismatch, s.total)
		}
		n, err := s.r.Read(p)
		p = p[n:]
		s.total += int64(n)
		switch {
		case err == io.EOF:
			s.ended = true
		case err != nil:
			return &sourceError{err}
		case n > 0:
			empty = 0
		default:
			if empty++; empty == maxEmptyReads {
				return &sourceError{io.ErrNoProgress}
			}
		}
	}
	return nil
}

// finish sees to it that nothing follows. More bytes are cas.ErrMismatch.
func (s *source) finish(ctx context.Context) error {
	var more [1]byte
	for range maxEmptyReads {
		if s.ended {
			return nil
		}
		if ctx.Err() != nil {
			return ended(ctx)
		}
		n, err := s.r.Read(more[:])
		if n > 0 {
			return fmt.Errorf("%w: it goes on after %d bytes", cas.ErrMismatch, s.total)
		}
		if err == io.EOF {
			s.ended = true
		} else if err != nil {
			return &sourceError{err}
		}
	}
	return &sourceError{io.ErrNoProgress}
}

// buffers recycles memory for blobs on their way into the store.
type buffers struct {
	medium, whole sync.Pool
}

const (
	// Below this, a fresh slice is cheaper than the memory that a pool holds.
	pooledSize = 4 << 10
	mediumSize = 64 << 10
)

// get returns a slice of at least size bytes, size <= chunkSize.
func (b *buffers) get(size int) []byte {
	pool, n := &b.whole, chunkSize
	if size <= pooledSize {
		return make([]byte, size)
	}
	if size <= mediumSize {
		pool, n = &b.medium, mediumSize
	}
	if p, ok := pool.Get().(*[]byte); ok {
		return *p
	}
	return make([]byte, n)
}

// put takes back what get returned. Nobody may use it any more.
func (b *buffers) put(p []byte) {
	switch len(p) {
	case mediumSize:
		b.medium.Put(&p)
	case chunkSize:
		b.whole.Put(&p)
	}
}
