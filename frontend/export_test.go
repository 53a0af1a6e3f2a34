package frontend

import (
	"io"
	"slices"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/mem"
)

// What tests of this package see besides its API.
var (
	StatusOf      = statusOf
	EndOf         = endOf
	SentinelCodes = sentinelCodes
)

// Sentinel is the error of a row of SentinelCodes.
func (r sentinelCode) Sentinel() error { return r.sentinel }

// The package's own sentinels.
var (
	ErrInvalid       = errInvalid
	ErrRange         = errRange
	ErrDenied        = errDenied
	ErrDisabled      = errDisabled
	ErrOversized     = errOversized
	ErrTooLarge      = errTooLarge
	ErrUnimplemented = errUnimplemented
	ErrNotFound      = errNotFound
	ErrDamaged       = errDamaged
	ErrBusy          = errBusy
	ErrRate          = errRate
	ErrMoved         = errMoved
	ErrDraining      = errDraining
	ErrInterrupted   = errInterrupted
	ErrStalled       = errStalled
	ErrSlow          = errSlow
	ErrPanic         = errPanic
	ErrDownloads     = errDownloads
)

// The bounds that tests reach.
const (
	MaxStatusText        = maxStatusText
	MaxViolations        = maxViolations
	MaxTrailerViolations = maxTrailerViolations
	PresentEvery         = presentEvery
)

// DecodeWriteRequest decodes a message that arrived in parts of at most cut bytes as the server does.
func DecodeWriteRequest(message []byte, cut int) (*bytestream.WriteRequest, error) {
	var buffers mem.BufferSlice
	for part := range slices.Chunk(message, cut) {
		buffers = append(buffers, mem.NewBuffer(&part, mem.NopBufferPool{}))
	}
	m := new(writeRequest)
	err := newCodec().Unmarshal(buffers, m)
	buffers.Free() // as gRPC does
	if err != nil {
		return nil, err
	}
	defer m.close()
	data, err := io.ReadAll(&m.data)
	return &bytestream.WriteRequest{ResourceName: m.name, WriteOffset: m.offset, FinishWrite: m.finish, Data: data}, err
}

// EncodeReadResponse encodes a message as the server does.
func EncodeReadResponse(data []byte) ([]byte, error) {
	chunks := &chunkPool{size: len(data)}
	buffers, err := newCodec().Marshal(&readResponse{data: chunks.copyOf(data)})
	defer buffers.Free()
	return buffers.Materialize(), err
}
