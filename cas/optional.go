package cas

import (
	"context"
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
