package pack

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/jetfarm/jetfarm/cas/keymap"
)

// A record is a header of 28 bytes, the blob, and zeros up to a multiple of 8. All numbers are
// little-endian:
//
//	0  4  recordMagic
//	4 16  the key of the blob
//	20 4  its size
//	24 4  CRC-32C of the 24 bytes before and of the blob
const (
	recordMagic = 0x314b504a // JPK1
	headerSize  = 28
	align       = 8
)

// update is CRC-32C.
func update(sum uint32, data []byte) uint32 {
	return crc32.Update(sum, crc32.MakeTable(crc32.Castagnoli), data)
}

// recordSize is how much of a segment a blob of this size takes.
func recordSize(size int64) int64 { return (headerSize + size + align - 1) &^ (align - 1) }

func appendRecord(b []byte, k keymap.Key, data []byte) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint32(b, recordMagic)
	b = append(b, k[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data))) //nolint:gosec // at most MaxBlob
	sum := update(update(0, b[start:]), data)
	b = binary.LittleEndian.AppendUint32(b, sum)
	b = append(b, data...)
	for len(b)%align != start%align {
		b = append(b, 0)
	}
	return b
}

// parseHeader returns what a header says, and not ok for bytes that are none.
func parseHeader(h []byte) (k keymap.Key, size int64, sum uint32, ok bool) {
	k = keymap.Key(h[4:20])
	size = int64(binary.LittleEndian.Uint32(h[20:]))
	sum = binary.LittleEndian.Uint32(h[24:])
	return k, size, sum, binary.LittleEndian.Uint32(h) == recordMagic && size > 0 && size <= MaxBlob
}

// place is where a blob is: 20 bits of the segment's number, 24 of the record's offset in units of 8
// bytes, and 17 of the blob's size, which is not 0.
type place uint64

const (
	sizeBits    = 17
	offsetBits  = 24
	segmentBits = 20
	numberMask  = 1<<segmentBits - 1
)

func newPlace(number uint64, offset, size int64) place {
	return place(number&numberMask<<(offsetBits+sizeBits) | uint64(offset/align)<<sizeBits | uint64(size)) //nolint:gosec // not negative
}

func (p place) number() uint64 { return uint64(p >> (offsetBits + sizeBits) & numberMask) }
func (p place) offset() int64  { return int64(p>>sizeBits&(1<<offsetBits-1)) * align }
func (p place) size() int64    { return int64(p & (1<<sizeBits - 1)) }
