package disk

import (
	"context"
	"errors"
	"hash/crc32"
	"os"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// A localError is the file system's: what the caller asked for can still be had from the source.
type localError struct{ err error }

func (e *localError) Error() string { return "disk tier: " + e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

func isLocal(err error) bool {
	var local *localError
	return errors.As(err, &local)
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// partial is a file of tmp that grows to a blob, and the verdict on it so far.
type partial struct {
	file *os.File
	seen *cas.Verifier
	sum  uint32
	size int64        // what was reserved
	room func() error // makes some on a full disk
	torn bool         // the file has not got what was seen
}

// begin reserves room and makes the file.
func (t *Tier) begin(ctx context.Context, d digest.Digest) (*partial, error) {
	t.reserve(ctx, d.Size())
	f, err := t.temp()
	if isFull(err) {
		t.squeeze(ctx, d.Size())
		f, err = t.temp()
	}
	if err != nil {
		t.release(d.Size())
		return nil, &localError{err}
	}
	squeezed := false
	room := func() error {
		if squeezed {
			return unix.ENOSPC
		}
		squeezed = true
		t.squeeze(ctx, d.Size())
		return nil
	}
	return &partial{file: f, seen: cas.NewVerifier(d), size: d.Size(), room: room}, nil
}

// squeeze makes room beyond the tier's own bound, because somebody else has filled the disk.
func (t *Tier) squeeze(ctx context.Context, size int64) {
	t.mu.Lock()
	used := t.index.used + t.reserved
	t.mu.Unlock()
	low := used - max(2*cost(size), t.max/20)
	t.trim(ctx, low, low)
}

// Write implements io.Writer. An error that is not the file system's is that the blob is too long.
func (p *partial) Write(b []byte) (int, error) {
	if n, err := p.seen.Write(b); err != nil {
		p.torn = true
		return n, err
	}
	p.sum = crc32.Update(p.sum, castagnoli(), b)
	n, err := p.file.Write(b)
	if isFull(err) && p.room != nil && p.room() == nil {
		var more int
		more, err = p.file.Write(b[n:])
		n += more
	}
	if err != nil {
		p.torn = true
		return n, &localError{err}
	}
	return n, nil
}

// publish makes a whole and verified partial a cached file. The file stays open.
func (t *Tier) publish(ctx context.Context, p *partial, k key) (entry, error) {
	e := entry{key: k, size: p.size, generation: t.generations.Add(1), sum: p.sum, summed: true}
	err := p.file.Chmod(mode(k.executable))
	if err == nil {
		err = os.Rename(p.file.Name(), t.path(e))
	}
	if err != nil {
		return entry{}, &localError{err}
	}
	t.insert(ctx, e)
	return e, nil
}

// seal publishes the partial and closes it. It is used up, also when there is an error.
func (t *Tier) seal(ctx context.Context, p *partial, k key) (entry, error) {
	e, err := t.publish(ctx, p, k)
	if err != nil {
		p.discard(ctx, t)
		return entry{}, err
	}
	return e, p.file.Close()
}

// discard closes and deletes the file; p may be nil.
func (p *partial) discard(ctx context.Context, t *Tier) {
	if p == nil {
		return
	}
	if err := errors.Join(p.file.Close(), os.Remove(p.file.Name())); err != nil {
		t.log.ErrorContext(ctx, "temporary file cannot be deleted", "file", p.file.Name(), "err", err)
	}
	t.release(p.size)
}

// castagnoli is the polynomial that CPUs have an instruction for.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }
