package cas

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// OpenFrames returns the bytes of a blob from offset on as zstd frames: those that the store has, or
// else frames made of what Open returns. The contract is that of FrameOpener. Nothing at all is one empty
// frame where frames are made here, since some decoders refuse an empty input.
func OpenFrames(ctx context.Context, s Store, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if f, ok := s.(FrameOpener); ok {
		return f.OpenFrames(ctx, d, offset)
	}
	r, err := s.Open(ctx, d, offset)
	if err != nil {
		return nil, err
	}
	return &framer{source: r, digest: d, left: d.Size() - offset}, nil
}

// framePiece is how much of a blob becomes one frame. Larger frames would not be much smaller together.
const framePiece = 512 << 10

// framer compresses what it reads, piece by piece as its reader asks for it. The last frame comes after
// the verdict on the blob.
type framer struct {
	source io.ReadCloser
	digest digest.Digest
	left   int64 // of the blob
	piece  []byte
	frame  []byte // has been compressed
	unread []byte // the part of it that was not handed out
	err    error  // what comes after unread
}

// Read implements io.Reader.
func (f *framer) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := f.fill(); err != nil {
		return 0, err
	}
	n := copy(p, f.unread)
	f.unread = f.unread[n:]
	return n, nil
}

// WriteTo implements io.WriterTo; a frame is valid only during its Write.
func (f *framer) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		switch err := f.fill(); {
		case errors.Is(err, io.EOF):
			return written, nil
		case err != nil:
			return written, err
		}
		n, err := w.Write(f.unread)
		written += int64(n)
		f.unread = f.unread[n:]
		if err != nil {
			return written, err
		}
	}
}

// Close implements io.Closer.
func (f *framer) Close() error { return f.source.Close() }

// fill makes the next frame when the last one was handed out.
func (f *framer) fill() error {
	if len(f.unread) > 0 {
		return nil
	}
	if f.err != nil {
		return f.err
	}
	if f.piece == nil {
		f.piece = make([]byte, min(f.left, framePiece))
	}
	piece := f.piece[:min(f.left, framePiece)]
	if n, err := io.ReadFull(f.source, piece); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: %v ended %d bytes too early", ErrMismatch, f.digest, f.left-int64(n))
		}
		f.err = err
		return err
	}
	f.left -= int64(len(piece))
	f.frame = compress.Append(f.frame[:0], piece)
	if f.left == 0 {
		if f.err = f.end(); !errors.Is(f.err, io.EOF) {
			return f.err
		}
	}
	f.unread = f.frame
	return nil
}

// end reads the verdict on the blob, which is io.EOF when it is whole.
func (f *framer) end() error {
	n, err := io.ReadFull(f.source, make([]byte, 1))
	if n > 0 {
		return fmt.Errorf("%w: %v goes on after its end", ErrMismatch, f.digest)
	}
	return err
}
