package objectstore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas"
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
	if err := whileBusy(ctx, func() error { return s.storeSmall(ctx, b, d, data) }); err != nil {
		return err
	}
	s.stored(b, d)
	return nil
}

// storeSmall publishes chunk and metadata back to back, so that they cost one round trip and the
// stream has them in this order. A chunk that is there makes the blob complete for this package; the
// metadata is for stock clients.
func (s *Store) storeSmall(ctx context.Context, b *bucket, d digest.Digest, data []byte) error {
	info, err := json.Marshal(objectInfo(b, d, tail(d)))
	if err != nil {
		return err
	}
	chunk, err := s.smallWrites.publish(ctx, b.chunks+tail(d), expect(0), data)
	if err != nil {
		return err
	}
	meta, err := s.smallWrites.publish(ctx, b.meta(d), expect(0), info)
	if err != nil {
		return err
	}
	_, errChunk := chunk.wait(ctx)
	sequence, errMeta := meta.wait(ctx)
	if errors.Is(errMeta, errExists) {
		errMeta = nil
	}
	if errors.Is(errChunk, errExists) {
		errChunk = nil
	}
	if errChunk != nil && errMeta == nil && sequence != 0 {
		// Stock clients must not list an object that has no content.
		cleaning, cancel := detached(ctx, s.cfg.RequestTimeout)
		defer cancel()
		errChunk = errors.Join(errChunk, s.small.delete(cleaning, b.stream, sequence))
	}
	return errors.Join(errChunk, errMeta)
}

// openSmall returns the blob if this bucket has it, whole and verified.
func (s *Store) openSmall(ctx context.Context, b *bucket, d digest.Digest, offset int64, known bool) (io.ReadCloser, error) {
	subject := b.chunks + tail(d)
	m, err := s.small.last(ctx, b.stream, subject)
	absent := errors.Is(err, cas.ErrNotFound)
	if (absent && s.doubts(known)) || (err == nil && d.Space().Of(m.data) != d) {
		m, err = s.small.lastFromLeader(ctx, b.stream, subject)
	}
	if err != nil {
		return nil, err
	}
	if d.Space().Of(m.data) != d {
		s.discard(ctx, b, d, m.sequence)
		return &failedReader{fmt.Errorf("%w: blob %v is damaged", cas.ErrMismatch, d)}, nil
	}
	s.index.set(keyOf(d), newEntry(b, d.Size()))
	s.metrics.readBytes.Add(float64(d.Size() - offset))
	return &memoryReader{*bytes.NewReader(m.data[offset:])}, nil
}

// memoryReader reads a verified blob.
type memoryReader struct{ bytes.Reader }

func (r *memoryReader) Close() error { return nil }

// failedReader is a blob that turned out to be damaged before its first byte.
type failedReader struct{ err error }

func (r *failedReader) Read([]byte) (int, error)         { return 0, r.err }
func (r *failedReader) WriteTo(io.Writer) (int64, error) { return 0, r.err }
func (r *failedReader) Close() error                     { return nil }
