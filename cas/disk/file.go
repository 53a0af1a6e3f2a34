package disk

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// A fileReader reads a cached file. From offset 0 it verifies: by the sum that was computed when the
// file was written, which costs next to nothing, or by the digest where there is no sum or the
// machine has been booted since. The last bytes come only when the verdict is good. It is no
// io.WriterTo: front ends read into the buffers that they send.
type fileReader struct {
	file *os.File
	left int64
	err  error // how the read ended

	whole bool // the read began at 0
	sum   uint32
	want  uint32
	seen  *cas.Verifier // nil when the sum is enough

	// These are bound to the context of Open.
	ended   func() error
	damaged func(why error)
	proven  func(sum uint32)
}

// openFile returns a reader of a cached file. A file of a wrong size is dropped and does not exist.
func (t *Tier) openFile(ctx context.Context, e entry, d digest.Digest, offset int64) (io.ReadCloser, error) {
	f, err := os.Open(t.path(e))
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Size() != d.Size() {
		t.log.WarnContext(ctx, "cached file is damaged", "blob", d, "size", info.Size())
		t.drop(ctx, e)
		err = os.ErrNotExist
	}
	if err == nil && offset > 0 {
		_, err = f.Seek(offset, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r := &fileReader{file: f, left: d.Size() - offset, whole: offset == 0, want: e.sum}
	if r.whole && (!e.summed || e.generation < t.trusted) {
		r.seen = cas.NewVerifier(d)
	}
	r.ended = func() error { return context.Cause(ctx) }
	r.damaged = func(why error) {
		t.log.WarnContext(ctx, "cached file is damaged", "blob", d, "err", why)
		t.forget(d, info, func(e entry) { t.drop(ctx, e) })
	}
	r.proven = func(sum uint32) { t.renew(ctx, e, sum) }
	return r, nil
}

// Read implements io.Reader.
func (r *fileReader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := r.next(p)
	r.err = err
	return n, err
}

func (r *fileReader) next(p []byte) (int, error) {
	if err := r.ended(); err != nil {
		return 0, err
	}
	if r.left == 0 {
		return 0, io.EOF
	}
	n, err := r.file.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if err != nil {
		err = fmt.Errorf("%w: cached file %s with %d bytes to go: %w", cas.ErrMismatch, r.file.Name(), r.left, err)
	} else if r.whole {
		err = r.check(p[:n])
	}
	if err != nil {
		r.damaged(err)
		return 0, err
	}
	return n, nil
}

// check takes the next bytes of the file and, after the last ones, returns the verdict.
func (r *fileReader) check(p []byte) error {
	r.sum = crc32.Update(r.sum, castagnoli(), p)
	if r.seen == nil {
		if r.left == 0 && r.sum != r.want {
			return fmt.Errorf("%w: cached file %s has the sum %08x", cas.ErrMismatch, r.file.Name(), r.sum)
		}
		return nil
	}
	if _, err := r.seen.Write(p); err != nil || r.left > 0 {
		return err
	}
	err := r.seen.Verdict()
	if err == nil {
		r.proven(r.sum)
	}
	return err
}

// Close ends the read.
func (r *fileReader) Close() error {
	r.err = errClosed
	return r.file.Close()
}

// forget calls drop for the variants of d whose file is the damaged one.
func (t *Tier) forget(d digest.Digest, damaged os.FileInfo, drop func(entry)) {
	for _, executable := range []bool{false, true} {
		t.mu.Lock()
		e, ok := t.index.get(t.keyOf(d, executable))
		t.mu.Unlock()
		if !ok {
			continue
		}
		if info, err := os.Lstat(t.path(e)); err == nil && os.SameFile(info, damaged) {
			drop(e)
		}
	}
}
