package frontend

import (
	"bytes"
	"sync"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	protobuf "google.golang.org/protobuf/proto"
)

// codec is gRPC's codec for protobuf that leaves the data of ByteStream messages where it is: that of
// a writeRequest in the buffers that the transport received, that of a readResponse in the buffer
// that the transport will send. The generated messages cost a copy and an allocation each way.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*readResponse); ok {
		return m.marshal(), nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*writeRequest); ok {
		return m.unmarshal(data)
	}
	return c.CodecV2.Unmarshal(data, v)
}

// The fields of google.bytestream's WriteRequest and ReadResponse.
const (
	fieldName   = 1
	fieldOffset = 2
	fieldFinish = 3
	fieldData   = 10
)

// writeRequest is a bytestream.WriteRequest whose data is still in the transport's buffers. It may be
// received into again; then, or with close, the buffers go back.
type writeRequest struct {
	name   string
	offset int64
	finish bool
	data   mem.Reader
}

// GetResourceName is what the generated message has.
func (m *writeRequest) GetResourceName() string { return m.name }

// close gives the buffers back.
func (m *writeRequest) close() { m.data.Close() } //nolint:errcheck // it has no error

// unmarshal takes the message apart without copying its data. That needs the data to be the last field,
// and the others to be in the first buffer, as all clients send it. Every other message is decoded
// as usual.
func (m *writeRequest) unmarshal(message mem.BufferSlice) error {
	m.name, m.offset, m.finish = "", 0, false
	m.close()
	if len(message) == 0 {
		return nil
	}
	head, ok := m.fields(message[0].ReadOnlyData(), message.Len())
	if !ok {
		return m.decode(message)
	}
	m.data.Reset(message)
	_, err := m.data.Discard(head)
	return err
}

// fields reads the fields before the data, given the first buffer of a message of total bytes. It
// returns how many bytes they take with the tag and length of the data, or false when the message is
// not of the usual form.
func (m *writeRequest) fields(first []byte, total int) (head int, ok bool) {
	for head < len(first) {
		number, kind, n := protowire.ConsumeTag(first[head:])
		if n < 0 {
			return 0, false
		}
		head += n
		switch {
		case number == fieldData && kind == protowire.BytesType:
			size, n := protowire.ConsumeVarint(first[head:])
			head += n
			return head, n > 0 && size == uint64(total-head) //nolint:gosec // a message is not shorter than its first buffer
		case number == fieldName && kind == protowire.BytesType:
			name, n := protowire.ConsumeBytes(first[head:])
			if n < 0 || !utf8.Valid(name) {
				return 0, false
			}
			m.name = string(name)
			head += n
		case kind == protowire.VarintType:
			value, n := protowire.ConsumeVarint(first[head:])
			if n < 0 || !m.number(number, value) {
				return 0, false
			}
			head += n
		default:
			return 0, false
		}
	}
	return head, head == total
}

// number takes a field that is a number, or returns false for one that it does not know.
func (m *writeRequest) number(field protowire.Number, value uint64) bool {
	switch field {
	case fieldOffset:
		m.offset = int64(value) //nolint:gosec // how protobuf encodes an int64
	case fieldFinish:
		m.finish = protowire.DecodeBool(value)
	default:
		return false
	}
	return true
}

// decode is unmarshal for a message of any form.
func (m *writeRequest) decode(message mem.BufferSlice) error {
	decoded := new(bytestream.WriteRequest)
	if err := protobuf.Unmarshal(message.Materialize(), decoded); err != nil {
		return err
	}
	m.name, m.offset, m.finish = decoded.GetResourceName(), decoded.GetWriteOffset(), decoded.GetFinishWrite()
	m.data.Reset(mem.BufferSlice{mem.SliceBuffer(decoded.GetData())})
	return nil
}

// readResponse is a bytestream.ReadResponse whose data the transport sends as it is and then frees.
type readResponse struct{ data mem.Buffer }

func (m *readResponse) marshal() mem.BufferSlice {
	head := protowire.AppendTag(nil, fieldData, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(m.data.Len())) //nolint:gosec // a length is not negative
	return mem.BufferSlice{mem.SliceBuffer(head), m.data}
}

// chunkPool is a mem.BufferPool of buffers of one size for data on its way to clients. Unlike gRPC's it
// does not clear what it hands out, since all of it is overwritten.
type chunkPool struct {
	size int
	pool sync.Pool // of *[]byte with size bytes
}

// Get implements mem.BufferPool for lengths up to the pool's size.
func (p *chunkPool) Get(length int) *[]byte {
	b, ok := p.pool.Get().(*[]byte)
	if !ok {
		fresh := make([]byte, p.size)
		b = &fresh
	}
	*b = (*b)[:length]
	return b
}

// Put implements mem.BufferPool.
func (p *chunkPool) Put(b *[]byte) {
	*b = (*b)[:cap(*b)]
	p.pool.Put(b)
}

// smallCopy is up to where data gets a buffer of its own: the pool's are too large to wait in a
// transport with so little in them.
const smallCopy = 32 << 10

// cut returns the first n bytes of a buffer of the pool as one to send.
func (p *chunkPool) cut(b *[]byte, n int) mem.Buffer { //nolint:ireturn // the library has no type for it
	if n <= smallCopy {
		small := p.copyOf((*b)[:n])
		p.Put(b)
		return small
	}
	*b = (*b)[:n]
	return mem.NewBuffer(b, p)
}

// copyOf returns a buffer with the bytes of p, which has at most the pool's size.
func (p *chunkPool) copyOf(data []byte) mem.Buffer { //nolint:ireturn // the library has no type for it
	if len(data) <= smallCopy {
		return mem.SliceBuffer(bytes.Clone(data))
	}
	b := p.Get(len(data))
	copy(*b, data)
	return mem.NewBuffer(b, p)
}
