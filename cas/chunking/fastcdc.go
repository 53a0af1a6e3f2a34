package chunking

import (
	"bytes"
	"crypto/md5" //nolint:gosec // The algorithm's table is made with it; nothing is protected by it.
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
)

// ErrInvalid reports parameters that REAPI does not allow.
var ErrInvalid = errors.New("invalid chunking parameters")

// Params are the parameters of REAPI's FastCdc2020Params (row CAP-18).
type Params struct {
	// Average is the expected size of a chunk, a power of two from 1 KiB to 8 MiB. Chunks have a
	// quarter of it at least, except for the last one of a blob, and four times it at most.
	Average int
	// Seed changes where blobs are cut.
	Seed uint32
}

// The bounds of Params.Average.
const (
	MinAverage = 1 << 10
	MaxAverage = 8 << 20
)

// Validate tells parameters that cannot be used. The error wraps ErrInvalid.
func (p Params) Validate() error {
	if p.Average < MinAverage || p.Average > MaxAverage || p.Average&(p.Average-1) != 0 {
		return fmt.Errorf("%w: an average of %d bytes is not a power of two from %d to %d", ErrInvalid, p.Average, MinAverage, MaxAverage)
	}
	return nil
}

// Min is the size of the smallest chunk that is not the last of its blob.
func (p Params) Min() int { return p.Average / 4 }

// Max is the size of the largest chunk.
func (p Params) Max() int { return p.Average * 4 }

// normalization is how many bits more than the average asks for a cut must match before the average
// size is reached, and how many less after it.
const normalization = 2

// Chunker finds chunks. It may be used concurrently.
type Chunker struct {
	min, average, max int
	// strict and loose are what the fingerprint must not have in common with them for a cut before
	// and after the average size.
	strict, loose uint64
	gear          [256]uint64
}

// New returns a Chunker. It panics with parameters that are not valid.
func New(p Params) *Chunker {
	if err := p.Validate(); err != nil {
		panic(err)
	}
	return newChunker(p.Min(), p.Average, p.Max(), uint64(p.Seed), normalization)
}

func newChunker(smallest, average, largest int, seed uint64, level int) *Chunker {
	c := &Chunker{min: smallest, average: average, max: largest}
	n := bits.TrailingZeros(uint(average))
	c.strict, c.loose = mask(n+level), mask(n-level)
	for i := range c.gear {
		sum := md5.Sum(bytes.Repeat([]byte{byte(i)}, md5.BlockSize)) //nolint:gosec // See the import.
		c.gear[i] = binary.BigEndian.Uint64(sum[:]) ^ seed
	}
	return c
}

// mask has n bits. Where they are is part of the algorithm.
func mask(n int) uint64 {
	return [...]uint64{
		5: 0x1804110, 6: 0x1803110, 7: 0x18035100, 8: 0x1800035300, 9: 0x19000353000, 10: 0x590003530000,
		11: 0xd90003530000, 12: 0xd90103530000, 13: 0xd90303530000, 14: 0xd90313530000, 15: 0xd90f03530000,
		16: 0xd90303537000, 17: 0xd90703537000, 18: 0xd90707537000, 19: 0xd91707537000, 20: 0xd91747537000,
		21: 0xd91767537000, 22: 0xd93767537000, 23: 0xd93777537000, 24: 0xd93777577000, 25: 0xdb3777577000,
	}[n]
}

// Cut returns the length of the first chunk of data, which has to be all that is left of the blob or at
// least the largest chunk.
func (c *Chunker) Cut(data []byte) int {
	n, _ := c.cut(data)
	return n
}

// cut returns the length of the first chunk and the fingerprint at its end, 0 for one that is as short
// as the smallest.
func (c *Chunker) cut(data []byte) (n int, fingerprint uint64) {
	if len(data) <= c.min {
		return len(data), 0
	}
	data = data[:min(len(data), c.max)]
	// The fingerprint moves by pairs of bytes, so the limits are even.
	first, normal, last := c.min&^1, min(c.average, len(data))&^1, len(data)&^1
	n, fingerprint = c.scan(data[:normal], first, 0, c.strict)
	if n < 0 {
		n, fingerprint = c.scan(data[:last], normal, fingerprint, c.loose)
	}
	if n < 0 {
		n = len(data)
	}
	return n, fingerprint
}

// scan looks for a cut in data, of an even length, from an offset on; n is -1 when there is none. The
// first byte of a pair adds to a fingerprint that is shifted for both, and is compared shifted by one.
func (c *Chunker) scan(data []byte, from int, fingerprint, mask uint64) (n int, end uint64) {
	for i := from; i+1 < len(data); i += 2 {
		fingerprint = fingerprint<<2 + c.gear[data[i]]<<1
		if fingerprint&(mask<<1) == 0 {
			return i, fingerprint
		}
		fingerprint += c.gear[data[i+1]]
		if fingerprint&mask == 0 {
			return i + 1, fingerprint
		}
	}
	return -1, fingerprint
}

// Split calls f with each chunk of what r has up to its end. The bytes are valid only during the call.
// Size is about how much that is; the memory that Split takes is twice the largest chunk or, if that is
// less, size. An error of r or f ends it and comes through as it is.
func (c *Chunker) Split(r io.Reader, size int64, f func(chunk []byte) error) error {
	w := window{source: r, most: 2 * c.max, buffer: make([]byte, min(int64(2*c.max), size+1))} // One more byte shows the end.
	for {
		if err := w.hold(c.max); err != nil {
			return err
		}
		if len(w.held) == 0 {
			return nil
		}
		n := c.Cut(w.held)
		if err := f(w.held[:n]); err != nil {
			return err
		}
		w.held = w.held[n:]
	}
}

// window is the part of a stream that is in memory.
type window struct {
	source io.Reader
	ended  bool
	buffer []byte
	most   int    // the largest buffer
	held   []byte // of buffer
}

// hold makes the window hold at least n bytes, or all that are left.
func (w *window) hold(n int) error {
	if len(w.held) >= n || w.ended {
		return nil
	}
	end := copy(w.buffer, w.held)
	for !w.ended && end < w.most {
		if end == len(w.buffer) {
			larger := make([]byte, w.most)
			copy(larger, w.buffer)
			w.buffer = larger
		}
		n, err := w.source.Read(w.buffer[end:])
		end += n
		if w.ended = errors.Is(err, io.EOF); err != nil && !w.ended {
			return err
		}
	}
	w.held = w.buffer[:end]
	return nil
}
