package compress

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// The errors of this package. An error of the reader or writer underneath is returned as it is.
var (
	// ErrInvalid reports input that is no zstd, is damaged or truncated, has something behind its last
	// frame, needs a dictionary or a window above MaxWindow, or is far too long for what it holds.
	ErrInvalid = errors.New("invalid zstd")
	// ErrTooLarge reports input that holds more bytes than its reader wanted.
	ErrTooLarge = errors.New("zstd holds more bytes than expected")
)

// MaxWindow is the largest window of a frame that is decoded, what level 19 of the zstd command needs at
// most (row ZST-2).
const MaxWindow = 8 << 20

// encodeWindow is the window of the frames made here: a reader needs as much memory.
const encodeWindow = 1 << 20

// coders is everything that is shared. The frame coders take one of as many states as there are
// processors for as long as a call computes, so calls never wait for anything but a processor.
type coders struct {
	frames  func() (*zstd.Encoder, error)
	blocks  func() (*zstd.Decoder, error)
	writers sync.Pool // of *zstd.Encoder
	readers sync.Pool // of *zstd.Decoder
}

var shared = coders{ //nolint:gochecknoglobals // pools are worth it only for the whole process
	frames: sync.OnceValues(func() (*zstd.Encoder, error) { return newEncoder(0) }),
	blocks: sync.OnceValues(func() (*zstd.Decoder, error) { return newDecoder(0, zstd.WithDecodeAllCapLimit(true)) }),
}

func newEncoder(concurrency int) (*zstd.Encoder, error) {
	return zstd.NewWriter(nil,
		zstd.WithEncoderConcurrency(concurrency), zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithWindowSize(encodeWindow), zstd.WithLowerEncoderMem(true), zstd.WithZeroFrames(true))
}

func newDecoder(concurrency int, options ...zstd.DOption) (*zstd.Decoder, error) {
	return zstd.NewReader(nil, append(options,
		zstd.WithDecoderConcurrency(concurrency), zstd.WithDecoderMaxWindow(MaxWindow), zstd.WithDecoderLowmem(true))...)
}

// must panics where constant options are refused.
func must[T any](v T, err error) T {
	if err != nil {
		panic("zstd coder: " + err.Error())
	}
	return v
}

// Append appends src to dst as one frame that tells the size of its content, also when src is empty.
func Append(dst, src []byte) []byte {
	return must(shared.frames()).EncodeAll(src, dst)
}

// Decode appends to dst what the frames of src hold, which has to be exactly size bytes. It allocates
// no more than that. The error wraps ErrInvalid or ErrTooLarge; an excess is the latter only where the
// frame says its size.
func Decode(dst, src []byte, size int64) ([]byte, error) {
	n := int(size)
	dst = slices.Grow(dst, n)
	out, err := must(shared.blocks()).DecodeAll(src, dst[:len(dst):len(dst)+n])
	switch got := len(out) - len(dst); {
	case errors.Is(err, zstd.ErrDecoderSizeExceeded), err == nil && got > n:
		return nil, fmt.Errorf("%w: it should hold %d", ErrTooLarge, size)
	case err != nil:
		return nil, invalid(err)
	case got < n:
		return nil, fmt.Errorf("%w: it holds %d bytes, not %d", ErrInvalid, got, size)
	}
	return out, nil
}

// invalid is ErrInvalid for an error of a decoder.
func invalid(err error) error {
	switch {
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%w: a frame has a window of more than %d bytes", ErrInvalid, MaxWindow)
	case errors.Is(err, zstd.ErrUnknownDictionary):
		return fmt.Errorf("%w: a frame needs a dictionary", ErrInvalid)
	case errors.Is(err, zstd.ErrMagicMismatch):
		return fmt.Errorf("%w: bytes that are no frame", ErrInvalid)
	}
	return fmt.Errorf("%w: %w", ErrInvalid, err)
}
