package frontend

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// httpChunk is how much of a blob is read and written at once.
const httpChunk = 256 << 10

// httpBuffers lends pairs of buffers.
type httpBuffers struct{ pool sync.Pool }

type httpPair [2][httpChunk]byte

func (b *httpBuffers) get() *httpPair {
	if pair, ok := b.pool.Get().(*httpPair); ok {
		return pair
	}
	return new(httpPair)
}

// send copies length bytes of r to the client. The last chunk is held back until r has ended well, when
// it is read to its end: a client of HTTP learns from a missing byte only that a blob was damaged. The
// headers are written with the first bytes that may be sent, so a failure before that is answered.
func (h *httpCache) send(a *httpAnswer, r io.Reader, status int, length int64, whole bool) error {
	pair := h.buffers.get()
	defer h.buffers.pool.Put(pair)
	held := pair[0][:0]
	for next, left := 1, length; left > 0; next = 1 - next {
		fresh := pair[next][:min(left, httpChunk)]
		n, err := io.ReadFull(r, fresh)
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", length-left+int64(n), length, unexpected(err))
		}
		left -= int64(n)
		if len(held) > 0 {
			if a.status == 0 {
				a.head(status, length)
			}
			if _, err := a.Write(held); err != nil {
				return err
			}
		}
		held = fresh
	}
	if whole {
		var one [1]byte
		switch _, err := io.ReadFull(r, one[:]); {
		case err == nil:
			return fmt.Errorf("%w: it continues after %d bytes", errDamaged, length)
		case !errors.Is(err, io.EOF):
			return err
		}
	}
	if a.status == 0 {
		a.head(status, length)
	}
	_, err := a.Write(held)
	return err
}

// unexpected makes the early end of a stored blob an error of its own.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ended early", errDamaged)
	}
	return err
}
