package cas

import (
	"context"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Resumer is a Store that keeps the beginning of an upload that broke off, so that the upload can go
// on where it stopped, in any process. An upload is named by its blob and a string that the client
// chose.
type Resumer interface {
	// Committed returns how many bytes of an upload are kept, 0 for one that is not known.
	Committed(ctx context.Context, d digest.Digest, upload string) (int64, error)

	// PutFrom is Put for an upload whose bytes before offset are kept; r begins at offset. Offset 0
	// starts over. An offset beyond what is kept is ErrNotKept, before r is read. When r fails, what
	// it brought is kept for a while; when the bytes do not match the digest, nothing is.
	PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error
}

// FrameOpener is a Store that has blobs in compressed form.
type FrameOpener interface {
	// OpenFrames is Open for zstd: what the reader returns are complete frames without a dictionary
	// that decompress to the bytes of the blob from offset on. The reader ends with ErrMismatch in
	// place of io.EOF when the stored copy is damaged.
	OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error)
}

// Peeker is a Store that has some of its blobs at hand.
type Peeker interface {
	// Peek returns the bytes of a blob when that takes no waiting. They have the digest, and the
	// caller must not change them. ok is false for a blob that has to be opened.
	Peek(d digest.Digest) (data []byte, ok bool)
}

// Peek is Peeker.Peek for any store.
func Peek(s Store, d digest.Digest) (data []byte, ok bool) {
	if p, ok := s.(Peeker); ok {
		return p.Peek(d)
	}
	return nil, false
}

// Committed is Resumer.Committed for any store; one that keeps no uploads has nothing of any.
func Committed(ctx context.Context, s Store, d digest.Digest, upload string) (int64, error) {
	if r, ok := s.(Resumer); ok {
		return r.Committed(ctx, d, upload)
	}
	return 0, nil
}

// PutFrom is Resumer.PutFrom for any store; one that keeps no uploads takes them from offset 0 only.
func PutFrom(ctx context.Context, s Store, d digest.Digest, upload string, offset int64, r io.Reader) error {
	if resumer, ok := s.(Resumer); ok {
		return resumer.PutFrom(ctx, d, upload, offset, r)
	}
	if offset != 0 {
		return fmt.Errorf("%w: %v from %d on", ErrNotKept, d, offset)
	}
	return s.Put(ctx, d, r)
}
