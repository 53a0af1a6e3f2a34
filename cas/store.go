package cas

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// The errors of every Store. They are tested with errors.Is; the text says which blob.
var (
	// ErrNotFound reports a blob that the store does not have. Nothing else is ErrNotFound: a store
	// that cannot tell says ErrUnavailable.
	ErrNotFound = errors.New("blob not found")
	// ErrMismatch reports bytes that do not have the digest they were given or stored under. On a
	// Put the writer is to blame and nothing was stored; on a read the stored copy is damaged, the
	// reader gets this error in place of io.EOF, and the store forgets the copy.
	ErrMismatch = errors.New("content does not match its digest")
	// ErrFull reports a store with no room left for the blob.
	ErrFull = errors.New("storage is full")
	// ErrNotKept reports an upload that cannot go on at the offset it asked for, see Resumer.
	ErrNotKept = errors.New("that part of the upload is not kept")
	// ErrUnavailable reports a store that did not answer in time or lost its connection. The call
	// may be repeated.
	ErrUnavailable = errors.New("storage unavailable")
)

// Store holds immutable blobs by digest. All methods may be called concurrently, return soon after
// ctx ends with an error that wraps context.Cause(ctx), and treat the empty blob as present without
// storing it and an impossible digest (digest.Digest.IsImpossible) as absent.
type Store interface {
	// Open returns the bytes of a blob from offset on; 0 <= offset <= size. The error wraps
	// ErrNotFound before any byte was read. The reader is bound to ctx and must be closed; it ends
	// with io.EOF after exactly size-offset bytes and, when it began at 0, only if they have the
	// digest, else with ErrMismatch. It may implement io.WriterTo with chunks that are valid only
	// during the Write call.
	Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error)

	// Put reads r to its end and stores it under d. The blob becomes visible, whole and durable, when
	// Put returns nil, and not before; a blob that is already there is success, in which case r may be
	// left unread. Bytes that do not match d are ErrMismatch; an error of r is returned as it is.
	// Put reads r only on the caller's goroutine and does not return while a Read is going on, so
	// whoever owns r must make its Read end when ctx does.
	Put(ctx context.Context, d digest.Digest, r io.Reader) error

	// Missing returns those of ds that are absent, each once, in the order of their first
	// appearance. What it leaves out is present and stays for at least the retention window. An
	// error means that nothing is known.
	Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error)
}

// Confirmer is a Store whose Missing may forget what it has, and which can look harder.
type Confirmer interface {
	// Confirm is Missing without forgetting, at a higher price for what is absent.
	Confirm(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error)
}

// Confirm returns which of ds are absent for certain. Whoever acts on absence, and does not merely
// upload again, asks this instead of Missing.
func Confirm(ctx context.Context, s Store, ds []digest.Digest) ([]digest.Digest, error) {
	if c, ok := s.(Confirmer); ok {
		return c.Confirm(ctx, ds)
	}
	return s.Missing(ctx, ds)
}

// ReadAll returns the bytes of a blob that has at most limit of them. A larger one is an error
// that says so and names the blob. A blob that turns out shorter or longer than its digest says is
// ErrMismatch. On an error no bytes are returned.
func ReadAll(ctx context.Context, s Store, d digest.Digest, limit int64) ([]byte, error) {
	if d.Size() > limit {
		return nil, fmt.Errorf("blob %v has %d bytes, at most %d are read into memory", d, d.Size(), limit)
	}
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	b, err := readExactly(r, d)
	if err := errors.Join(err, r.Close()); err != nil {
		return nil, err
	}
	return b, nil
}

// readExactly reads r to its end, which is where the verdict on the digest comes.
func readExactly(r io.Reader, d digest.Digest) ([]byte, error) {
	b := make([]byte, d.Size())
	n, err := io.ReadFull(r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("%w: %v ended after %d bytes", ErrMismatch, d, n)
	}
	if err != nil {
		return nil, err
	}
	switch _, err := io.ReadFull(r, make([]byte, 1)); {
	case err == nil:
		return nil, fmt.Errorf("%w: %v continues after %d bytes", ErrMismatch, d, n)
	case !errors.Is(err, io.EOF):
		return nil, err
	}
	return b, nil
}

// PutBytes stores data under its digest in the space and returns that.
func PutBytes(ctx context.Context, s Store, space digest.Space, data []byte) (digest.Digest, error) {
	d := space.Of(data)
	return d, s.Put(ctx, d, bytes.NewReader(data))
}
