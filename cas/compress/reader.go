package compress

import (
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Reader decodes a stream. It is used by one goroutine.
type Reader struct {
	source  source
	decoder *zstd.Decoder // nil after Close
	left    int64         // bytes that may still come out
	limit   int64
	err     error // sticky
}

// NewReader returns a reader of what the frames of r hold, which may be nothing. It ends with io.EOF where
// r ends if that is the end of a frame, and with ErrInvalid otherwise; more than limit bytes are
// ErrTooLarge, found before the rest is decoded. An error of r comes through as it is. It reads no more
// of r than 2*limit + 1 MiB, since empty and skippable frames may go on for ever (row ZST-7).
func NewReader(r io.Reader, limit int64) *Reader {
	d, ok := shared.readers.Get().(*zstd.Decoder)
	if !ok {
		d = must(newDecoder(1))
	}
	const allowance, most = 1 << 20, 1 << 61
	z := &Reader{source: source{r: r, left: 2*min(limit, most) + allowance}, decoder: d, left: limit, limit: limit}
	z.err = d.Reset(&z.source)
	return z
}

// Read implements io.Reader.
func (z *Reader) Read(p []byte) (int, error) {
	if z.err != nil {
		return 0, z.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if int64(len(p)) > z.left {
		p = p[:z.left+1]
	}
	n, err := z.decoder.Read(p)
	switch {
	case int64(n) > z.left:
		n, z.err = 0, fmt.Errorf("%w: more than %d", ErrTooLarge, z.limit)
	case z.source.err != nil && err != nil:
		z.err = z.source.err
	case errors.Is(err, io.EOF):
		z.err = io.EOF
	case err != nil:
		z.err = invalid(err)
	}
	z.left -= int64(n)
	return n, z.err
}

var errClosed = errors.New("zstd reader is closed")

// Close gives the decoder back. It does not close what was read from, and may be called again.
func (z *Reader) Close() error {
	if d := z.decoder; d != nil {
		z.decoder, z.err = nil, errClosed
		if d.Reset(nil) == nil {
			shared.readers.Put(d)
		}
	}
	return nil
}

// source is the compressed stream. It remembers its error, which the decoder may take for an end.
type source struct {
	r    io.Reader
	left int64
	err  error
}

func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if s.left == 0 {
		// One more byte tells an end from an excess.
		if n, err := io.ReadFull(s.r, make([]byte, 1)); n == 0 {
			if !errors.Is(err, io.EOF) {
				s.err = err
			}
			return 0, err
		}
		s.err = fmt.Errorf("%w: the input goes on after twice the bytes that it should hold", ErrInvalid)
		return 0, s.err
	}
	n, err := s.r.Read(p[:min(int64(len(p)), s.left)])
	s.left -= int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}
