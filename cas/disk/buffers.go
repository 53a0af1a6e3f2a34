package disk

import "sync"

// bufferSize is that of the messages in which front ends send blobs.
const bufferSize = 1 << 20

// buffers lends out buffers.
type buffers struct{ pool sync.Pool }

func (b *buffers) get() *[]byte {
	if buf, ok := b.pool.Get().(*[]byte); ok {
		return buf
	}
	buf := make([]byte, bufferSize)
	return &buf
}

func (b *buffers) put(buf *[]byte) { b.pool.Put(buf) }
