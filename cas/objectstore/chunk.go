package objectstore

import (
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// chunkHeader is the header of a large blob's chunk: the number of the chunk in the blob, from 0, and
// the CRC-32C of the payload in hex, with a space in between. It shows a chunk that is damaged or not
// where it belongs when there is no hash to compare, which is when a read begins in the middle, hands
// out compressed bytes or resumes an upload.
const chunkHeader = "Jetfarm-Chunk"

// headerOf returns the header of a chunk. After is the sequence that the last message of the subject
// must have, or 0 for any.
func headerOf(number int, payload []byte, zstd bool, after uint64) nats.Header {
	h := nats.Header{chunkHeader: {fmt.Sprintf("%d %08x", number, checksum(payload))}}
	if zstd {
		h[encodingHeader] = []string{encodingZstd}
	}
	if after != 0 {
		h[jetstream.ExpectedLastSubjSeqHeader] = []string{strconv.FormatUint(after, 10)}
	}
	return h
}

// checkChunk tells whether a message is the chunk of this number. Chunks of earlier versions have no
// header.
func checkChunk(h nats.Header, number int, payload []byte) error {
	values := h[chunkHeader]
	if len(values) == 0 {
		return nil
	}
	n, sum, _ := strings.Cut(values[0], " ")
	if n != strconv.Itoa(number) {
		return fmt.Errorf("chunk %s is in the place of chunk %d", strconv.Quote(n), number)
	}
	if sum != fmt.Sprintf("%08x", checksum(payload)) {
		return fmt.Errorf("the bytes of chunk %d have another checksum", number)
	}
	return nil
}

// isChunk tells the chunk of this number.
func isChunk(h nats.Header, number int) bool {
	values := h[chunkHeader]
	return len(values) > 0 && strings.HasPrefix(values[0], strconv.Itoa(number)+" ")
}

func checksum(payload []byte) uint32 {
	return crc32.Checksum(payload, crc32.MakeTable(crc32.Castagnoli))
}
