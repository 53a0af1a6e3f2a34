package disk

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// A stream reads a blob while it is fetched: what the flight has brought from the file, what it has
// not by taking a turn. When the file system fails, it goes on with the source alone.
type stream struct {
	t      *Tier
	digest digest.Digest
	key    key
	flight *flight // nil after it was left
	pos    int64
	sum    uint32 // of what was delivered
	alone  io.ReadCloser
	err    error // how the read ended

	// These are bound to the context of Open.
	more  func(p []byte) (int, error)
	leave func()
}

// newStream returns a reader that takes part in a flight, which the caller has joined.
func (t *Tier) newStream(ctx context.Context, f *flight, k key, d digest.Digest) *stream {
	s := &stream{t: t, digest: d, key: k, flight: f}
	s.more = func(p []byte) (int, error) { return s.next(ctx, p) }
	s.leave = func() {
		if s.flight != nil {
			t.leave(ctx, s.flight, k)
			s.flight = nil
		}
	}
	return s
}

// prime sees to it that the flight has something to read, or returns its error.
func (s *stream) prime(ctx context.Context) error {
	buf := s.t.buffers.get()
	defer s.t.buffers.put(buf)
	for s.flight.ready.Load() == 0 {
		select {
		case <-s.flight.done:
			if s.flight.err == nil && s.flight.ready.Load() == 0 {
				return errElsewhere
			}
			return s.flight.err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.flight.baton:
		}
		if _, _, err := s.t.turn(ctx, s.flight, s.key, s.digest, *buf); err != nil {
			return err
		}
	}
	return nil
}

// errElsewhere says that a flight has landed without a file of its own.
var errElsewhere = errors.New("the tier has got the blob in the meantime")

// next returns bytes from wherever they are.
func (s *stream) next(ctx context.Context, p []byte) (int, error) {
	for s.alone == nil {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if ready := s.flight.ready.Load(); s.pos < ready {
			n, err := s.flight.file.ReadAt(p[:min(int64(len(p)), ready-s.pos)], s.pos)
			if n > 0 {
				return n, nil
			}
			s.t.log.WarnContext(ctx, "a file that is being fetched cannot be read", "blob", s.digest, "err", err)
			if err := s.detach(ctx); err != nil {
				return 0, err
			}
			continue
		}
		if s.pos == s.digest.Size() {
			return 0, s.verdict()
		}
		n, err := s.turn(ctx, p)
		if isLocal(err) {
			err = s.detach(ctx)
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
	return s.alone.Read(p)
}

// verdict is io.EOF when what was delivered is what was verified.
func (s *stream) verdict() error {
	if s.sum != s.flight.sum {
		return fmt.Errorf("%w: the file of %v has changed while it was read", cas.ErrMismatch, s.digest)
	}
	return io.EOF
}

// turn takes a turn when nobody else does.
func (s *stream) turn(ctx context.Context, p []byte) (int, error) {
	f := s.flight
	select {
	case <-f.done:
		return 0, f.err
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-f.baton:
	}
	if f.ready.Load() > s.pos {
		f.baton <- struct{}{} // It was taken out above: this never waits.
		return 0, nil
	}
	if len(p) < smallest || f.part != nil && f.part.seen.Size() != s.pos {
		buf := s.t.buffers.get()
		defer s.t.buffers.put(buf)
		_, _, err := s.t.turn(ctx, f, s.key, s.digest, *buf)
		return 0, err // The bytes are in the file.
	}
	n, _, err := s.t.turn(ctx, f, s.key, s.digest, p)
	if n > 0 {
		return n, nil // The bytes are good, even if the file can't be kept.
	}
	return n, err
}

// detach goes on with the source alone. That reads the blob from its start, so that the source
// verifies it, and checks that it begins with what was delivered.
func (s *stream) detach(ctx context.Context) error {
	s.t.metrics.gaveWay.Inc()
	r, err := s.t.source.Open(ctx, s.digest, 0)
	if err != nil {
		return err
	}
	sum := crc32.New(castagnoli())
	if n, err := io.CopyN(sum, r, s.pos); err != nil {
		return errors.Join(fmt.Errorf("skipping %d of %d bytes of %v: %w", n, s.pos, s.digest, err), r.Close())
	}
	if sum.Sum32() != s.sum {
		return errors.Join(fmt.Errorf("%w: the source has other bytes of %v than before", cas.ErrMismatch, s.digest), r.Close())
	}
	s.leave()
	s.alone = r
	return nil
}

// Read implements io.Reader.
func (s *stream) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := s.more(p)
	s.pos += int64(n)
	if s.alone == nil {
		s.sum = crc32.Update(s.sum, castagnoli(), p[:n])
	}
	s.err = err
	return n, err
}

// Close leaves the flight.
func (s *stream) Close() error {
	s.leave()
	s.err = errClosed
	if s.alone != nil {
		return s.alone.Close()
	}
	return nil
}

var errClosed = errors.New("read after Close")
