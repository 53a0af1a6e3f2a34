package objectstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// putSmall stores a blob of one chunk.
func (s *Store) putSmall(ctx context.Context, d digest.Digest, r io.Reader) error {
	buffer := s.buffers.get(int(d.Size()))
	defer s.buffers.put(buffer)
	data := buffer[:d.Size()]
	src := source{r: r}
	if err := src.fill(ctx, data); err != nil {
		return err
	}
	if err := src.finish(ctx); err != nil {
		return err
	}
	if d.Space().Of(data) != d {
		return fmt.Errorf("%w: the bytes have another hash", cas.ErrMismatch)
	}

	b, done, err := s.place(ctx, d, d.Size())
	if err != nil {
		return err
	}
	defer done()
	if err := b.budget.Acquire(ctx, d.Size()); err != nil {
		return ended(ctx)
	}
	defer b.budget.Release(d.Size())
	err = retry(ctx, busyAttempts, errBusy, func() error { return s.storeSmall(ctx, b, d, data) })
	if errors.Is(err, cas.ErrFull) || errors.Is(err, errBusy) {
		return errors.Join(notBusy(err), s.retract(ctx, b, d))
	}
	if err != nil {
		return err
	}
	s.stored(b, d)
	return nil
}

// storeSmall stores a verified blob of one chunk.
func (s *Store) storeSmall(ctx context.Context, b *bucket, d digest.Digest, data []byte) error {
	a, err := s.sendSmall(ctx, b, d, data)
	if err != nil {
		return err
	}
	defer a.forget()
	_, err = a.wait(ctx, s.cfg.RequestTimeout)
	if errors.Is(err, errExists) {
		return nil
	}
	return err
}

// sendSmall publishes metadata and chunk back to back. The stream has them in this order and a chunk
// that is there makes the blob complete, so only the chunk is acknowledged. The metadata is for stock
// clients; where it is already, the second one is refused without a word. So is one that meets a busy
// stream, and then stock clients do not see the blob.
func (s *Store) sendSmall(ctx context.Context, b *bucket, d digest.Digest, data []byte) (*ack, error) {
	chunk := tail(d)
	payload, f := s.packSmall(d, data)
	info := appendObjectInfo(make([]byte, 0, infoSize), b, d, chunk, f)
	if err := s.smallWrites.send(ctx, b.meta(d), s.smallWrites.expectNone, info); err != nil {
		return nil, err
	}
	h := s.smallWrites.expectNone
	if f.zstd {
		h = expect(0)
		h[encodingHeader] = []string{encodingZstd}
	}
	return s.smallWrites.publish(ctx, b.chunks+chunk, h, payload)
}

// retract removes the metadata of a small blob whose chunk was refused: stock clients must not list
// an object that has no content. Another writer whose metadata was refused because of this one may
// store the chunk meanwhile; then stock clients miss an object that this package has.
func (s *Store) retract(ctx context.Context, b *bucket, d digest.Digest) error {
	cleaning, cancel := detached(ctx, s.cfg.RequestTimeout)
	defer cancel()
	m, err := s.small.lastFromLeader(cleaning, b.stream, b.meta(d))
	if errors.Is(err, cas.ErrNotFound) {
		return nil
	}
	stored := false
	if err == nil {
		err = s.small.subjects(cleaning, b.stream, b.chunks+tail(d), func(string) { stored = true })
	}
	if err == nil && !stored {
		err = s.small.delete(cleaning, b.stream, m.sequence)
	}
	return err
}

// openSmall returns the blob if this bucket has it, whole and verified.
func (s *Store) openSmall(ctx context.Context, b *bucket, d digest.Digest, from span, known bool) (io.ReadCloser, error) {
	subject := b.chunks + tail(d)
	m, err := s.small.last(ctx, b.stream, subject)
	var data []byte
	whole := false
	if err == nil {
		data, whole = wholly(d, m.header, m.data)
	}
	if (err == nil && !whole) || (errors.Is(err, cas.ErrNotFound) && s.doubts(known)) {
		if m, err = s.small.lastFromLeader(ctx, b.stream, subject); err == nil {
			data, whole = wholly(d, m.header, m.data)
		}
	}
	if err != nil {
		return nil, err
	}
	if !whole {
		s.discard(ctx, b, d, m.sequence)
		return &failedReader{fmt.Errorf("%w: blob %v is damaged", cas.ErrMismatch, d)}, nil
	}
	s.index.set(keyOf(d), newEntry(b, d.Size()))
	s.metrics.readBytes.Add(float64(d.Size() - from.offset))
	switch {
	case from.frames && from.offset == 0 && isZstd(m.header):
		data = m.data
	case from.frames:
		data = compress.Append(nil, data[from.offset:])
	default:
		data = data[from.offset:]
	}
	return &memoryReader{*bytes.NewReader(data)}, nil
}

// memoryReader reads a verified blob.
type memoryReader struct{ bytes.Reader }

func (r *memoryReader) Close() error { return nil }

// failedReader is a blob that turned out to be damaged before its first byte.
type failedReader struct{ err error }

func (r *failedReader) Read([]byte) (int, error)         { return 0, r.err }
func (r *failedReader) WriteTo(io.Writer) (int64, error) { return 0, r.err }
func (r *failedReader) Close() error                     { return nil }
