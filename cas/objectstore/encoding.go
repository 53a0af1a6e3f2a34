package objectstore

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/keymap"
)

// Compression says which blobs are stored compressed; docs/adr/0004 has the measurements. Blobs that
// are stored in either form are read by every Store.
type Compression string

const (
	// CompressNothing stores bytes as they come.
	CompressNothing Compression = "off"
	// CompressAuto compresses small blobs, and large ones whose bytes come more slowly than they are
	// compressed, with half of the processors at most.
	CompressAuto Compression = "auto"
	// CompressAll compresses whatever gets smaller.
	CompressAll Compression = "all"
)

// Compressions lists the values of Compression.
func Compressions() []Compression {
	return []Compression{CompressAuto, CompressAll, CompressNothing}
}

// encodingHeader says how the payload of a chunk, and in metadata how the chunks of an object, are
// encoded: `zstd` for one frame in each chunk. Together they are a valid zstd stream. Without it they
// are the bytes of the blob.
const encodingHeader = "Jetfarm-Encoding"

const encodingZstd = "zstd"

const (
	// compressFrom is the size of the smallest blob that is compressed: below, a frame costs more to
	// make than the whole put and saves little.
	compressFrom = 4 << 10
	// sampleSize is how much of a chunk tells whether to compress it, and large blobs by their first.
	sampleSize = 64 << 10
	// slowChunk is how long a chunk takes to be compressed, about.
	slowChunk = 2 * time.Millisecond
)

// frameRoom is more than what a frame is larger than what it holds.
const frameRoom = 64

// pays tells whether a compressed form is worth the work of every reader.
func pays(compressed, plain int) bool { return compressed <= plain/5*4 }

// form is how an object is stored.
type form struct {
	zstd   bool
	size   int64
	sha256 []byte // of what is stored, which stock clients check
}

// packSmall returns the payload of a blob of one chunk. It may be memory of the caller's.
func (s *Store) packSmall(d digest.Digest, data []byte) ([]byte, form) {
	if s.cfg.Compression != CompressNothing && len(data) >= compressFrom && sampled(data) {
		if frame := compress.Append(make([]byte, 0, len(data)/2), data); pays(len(frame), len(data)) {
			sum := sha256.Sum256(frame)
			return frame, form{zstd: true, size: int64(len(frame)), sha256: sum[:]}
		}
	}
	f := form{size: int64(len(data))}
	if d.Space().Function() == digest.SHA256 {
		f.sha256 = hashBytes(d)
	} else {
		sum := sha256.Sum256(data)
		f.sha256 = sum[:]
	}
	return data, f
}

// sampled tells whether to try to compress a blob, by a part of it if it is much larger than that.
func sampled(data []byte) bool {
	if len(data) < 2*sampleSize {
		return true
	}
	middle := (len(data) - sampleSize) / 2
	return pays(len(compress.Append(make([]byte, 0, sampleSize), data[middle:middle+sampleSize])), sampleSize)
}

// hashBytes is the hash of a digest as bytes.
func hashBytes(d digest.Digest) []byte {
	hash := d.Hash()
	sum := make([]byte, len(hash)/2)
	for i := range sum {
		sum[i] = keymap.Nibble(hash[2*i])<<4 | keymap.Nibble(hash[2*i+1])
	}
	return sum
}

func isZstd(h nats.Header) bool {
	values := h[encodingHeader]
	return len(values) > 0 && values[0] == encodingZstd
}

// unpack appends to dst the size bytes of which a payload is the stored form, or returns the payload
// itself when it is them.
func unpack(dst []byte, h nats.Header, payload []byte, size int64) ([]byte, error) {
	if len(h[encodingHeader]) > 0 {
		if !isZstd(h) {
			return nil, fmt.Errorf("it has the encoding %q", h[encodingHeader][0])
		}
		return compress.Decode(dst, payload, size)
	}
	if int64(len(payload)) != size {
		return nil, fmt.Errorf("it has %d bytes, not %d", len(payload), size)
	}
	return payload, nil
}

// wholly is unpack for a small blob, with the verdict on its digest.
func wholly(d digest.Digest, h nats.Header, payload []byte) ([]byte, bool) {
	data, err := unpack(nil, h, payload, d.Size())
	return data, err == nil && d.Space().Of(data) == d
}

// encoder makes the payloads of the chunks of one large blob.
type encoder struct {
	mode   Compression
	busy   chan struct{} // holds one for every processor that compresses
	frames bool          // every chunk is a frame; decided by the first
	buffer []byte
}

func newBusy() chan struct{} { return make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)) }

// begin decides by the first chunk, which took so long to come.
func (e *encoder) begin(data []byte, took time.Duration) {
	if e.mode == CompressAll || (e.mode == CompressAuto && took >= slowChunk) {
		e.frames = sampled(data)
	}
}

// encode returns the payload of a chunk, which is valid until the next call.
func (e *encoder) encode(data []byte, took time.Duration) []byte {
	if !e.frames {
		return data
	}
	if e.mode == CompressAuto {
		if took < slowChunk {
			e.buffer = appendRaw(e.buffer[:0], data)
			return e.buffer
		}
		select {
		case e.busy <- struct{}{}:
			defer func() { <-e.busy }()
		default:
			e.buffer = appendRaw(e.buffer[:0], data)
			return e.buffer
		}
	}
	e.buffer = compress.Append(e.buffer[:0], data)
	if !pays(len(e.buffer), len(data)) {
		e.buffer = appendRaw(e.buffer[:0], data) // which costs its readers nothing
	}
	return e.buffer
}

// appendRaw appends data as one frame that does not compress it: RFC 8878, 3.1.1, with a content size
// of four bytes, which is also the window, and blocks of the most that a block may have.
func appendRaw(dst, data []byte) []byte {
	const maxBlock = 128 << 10
	const singleSegment = 0b10_1_00000
	dst = binary.LittleEndian.AppendUint32(dst, 0xFD2FB528)
	dst = append(dst, singleSegment)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(data))) //nolint:gosec // at most a chunk
	for first := true; first || len(data) > 0; first = false {
		n := min(len(data), maxBlock)
		header := n << 3
		if n == len(data) {
			header |= 1 // the last block
		}
		dst = append(dst, byte(header), byte(header>>8), byte(header>>16)) //nolint:gosec // three bytes of it
		dst = append(dst, data[:n]...)
		data = data[n:]
	}
	return dst
}

var _ cas.FrameOpener = (*Store)(nil)

// OpenFrames is Open for zstd, see cas.FrameOpener. What is stored compressed is passed on as it is,
// except the chunk in which the read begins. That a chunk is what was stored is known by its checksum,
// and that what was stored is the blob by the upload, which made the frames of verified bytes and put
// their own checksums into them.
func (s *Store) OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	return s.openCounted(ctx, d, span{offset: offset, frames: true})
}
