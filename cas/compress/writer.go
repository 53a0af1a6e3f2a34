package compress

import (
	"io"

	"github.com/klauspost/compress/zstd"
)

// Writer encodes a stream as one frame. It is used by one goroutine.
type Writer struct {
	encoder *zstd.Encoder // nil after Close
}

// NewWriter returns a writer to w, which gets the compressed bytes in blocks on the caller's goroutine.
func NewWriter(w io.Writer) *Writer {
	e, ok := shared.writers.Get().(*zstd.Encoder)
	if !ok {
		e = must(newEncoder(1))
	}
	e.Reset(w)
	return &Writer{encoder: e}
}

// Write implements io.Writer.
func (z *Writer) Write(p []byte) (int, error) {
	if z.encoder == nil {
		return 0, io.ErrClosedPipe
	}
	return z.encoder.Write(p)
}

// Close writes the end of the frame and gives the encoder back. It has to be called after an error too,
// does not close what is written to, and may be called again.
func (z *Writer) Close() error {
	e := z.encoder
	if e == nil {
		return nil
	}
	z.encoder = nil
	err := e.Close()
	e.Reset(nil)
	shared.writers.Put(e)
	return err
}
