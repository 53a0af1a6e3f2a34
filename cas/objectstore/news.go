package objectstore

import (
	"encoding/binary"
	"sync"
)

// SubjectIndex is the core NATS subject of announcements. A message is the byte 1, the version of
// the format, and 8 random bytes that name the sender, followed by records of 24 bytes: the key of a
// blob (the first 16 bytes of its hash, outside the default key space xor the first 16 bytes of the
// SHA-256 of the space's token) and a big-endian number of 20 bits of generation, one bit that is set
// for large blobs, and 43 bits of size. Size 0 says that the blob is in no generation up to this one;
// where that is wrong, the blob is uploaded once more.
const SubjectIndex = "jetfarm.cas.idx"

const (
	newsVersion = 1
	headSize    = 1 + 8
	recordSize  = 24
	// newsRecords bounds one message to about 200 KB.
	newsRecords = 8192
	// newsBacklog bounds the records that wait for Run.
	newsBacklog = 1 << 16
)

// record is one announcement.
type record struct {
	key   key
	entry entry
}

// news is the announcements that wait to be published.
type news struct {
	sender uint64 // names this Store in its messages

	wake chan struct{} // has room for one

	mu      sync.Mutex
	waiting []record // guarded by mu
}

// add queues a record and never blocks. It is false when too many wait.
func (n *news) add(r record) bool {
	n.mu.Lock()
	full := len(n.waiting) >= newsBacklog
	if !full {
		n.waiting = append(n.waiting, r)
	}
	n.mu.Unlock()
	select {
	case n.wake <- struct{}{}:
	default:
	}
	return !full
}

// take removes what waits.
func (n *news) take() []record {
	n.mu.Lock()
	defer n.mu.Unlock()
	taken := n.waiting
	n.waiting = nil
	return taken
}

// encodeNews is the message for at most newsRecords records.
func encodeNews(sender uint64, records []record) []byte {
	data := make([]byte, 1, headSize+len(records)*recordSize)
	data[0] = newsVersion
	data = binary.BigEndian.AppendUint64(data, sender)
	for _, r := range records {
		data = append(data, r.key[:]...)
		data = binary.BigEndian.AppendUint64(data, uint64(r.entry))
	}
	return data
}

// decodeNews is the inverse of encodeNews. Messages of another version are not ok.
func decodeNews(data []byte) (sender uint64, records []record, ok bool) {
	if len(data) < headSize || data[0] != newsVersion || (len(data)-headSize)%recordSize != 0 {
		return 0, nil, false
	}
	sender = binary.BigEndian.Uint64(data[1:])
	for data = data[headSize:]; len(data) > 0; data = data[recordSize:] {
		records = append(records, record{
			key:   key(data[:len(key{})]),
			entry: entry(binary.BigEndian.Uint64(data[len(key{}):])),
		})
	}
	return sender, records, true
}
