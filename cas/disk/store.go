package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// fillLimit is up to which size a blob that is read is fetched into the tier. A larger one is
// passed through, so that its reader has the first bytes at once.
const fillLimit = 1 << 20

// Open implements cas.Store.
func (t *Tier) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if d.IsEmpty() {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	executable := t.variant(d, false)
	t.mu.Lock()
	held := t.holds(d, executable)
	t.mu.Unlock()
	if !held && (d.Size() > fillLimit || d.IsImpossible()) {
		return t.source.Open(ctx, d, offset)
	}
	var f *os.File
	err := t.with(ctx, d, executable, func(path string) (err error) {
		f, err = os.Open(path)
		return err
	})
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return t.reader(ctx, f, d, offset), nil
}

// Put implements cas.Store.
func (t *Tier) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return t.source.Put(ctx, d, r)
}

// PutBatch implements cas.BatchPutter.
func (t *Tier) PutBatch(ctx context.Context, ds []digest.Digest, data [][]byte) []error {
	const width = 32 // for a source that takes no batches
	return cas.PutBatch(ctx, t.source, width, ds, data)
}

// Missing implements cas.Store.
func (t *Tier) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return t.source.Missing(ctx, ds)
}

// Confirm implements cas.Confirmer.
func (t *Tier) Confirm(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return cas.Confirm(ctx, t.source, ds)
}

// reader reads the file to the size of the blob, verified when it begins at 0. A file that turns
// out damaged is forgotten.
func (t *Tier) reader(ctx context.Context, f *os.File, d digest.Digest, offset int64) io.ReadCloser {
	var r io.Reader = &tailReader{file: f, left: d.Size() - offset}
	if offset == 0 {
		r = cas.Verify(f, d)
	}
	return struct {
		io.Reader
		io.Closer
	}{readerFunc(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		n, err := r.Read(p)
		if errors.Is(err, cas.ErrMismatch) {
			t.forget(ctx, d, f)
		}
		return n, err
	}), f}
}

// tailReader ends with io.EOF after exactly left bytes.
type tailReader struct {
	file *os.File
	left int64
}

func (r *tailReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		return 0, io.EOF
	}
	n, err := r.file.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: cached file %s is %d bytes short", cas.ErrMismatch, r.file.Name(), r.left)
	}
	return n, err
}

// forget drops the variants of d whose file is f.
func (t *Tier) forget(ctx context.Context, d digest.Digest, f *os.File) {
	damaged, err := f.Stat()
	if err != nil {
		return
	}
	for _, executable := range []bool{false, true} {
		t.mu.Lock()
		e, ok := t.index.get(t.keyOf(d, executable))
		t.mu.Unlock()
		if !ok {
			continue
		}
		if info, err := os.Lstat(t.path(e)); err == nil && os.SameFile(info, damaged) {
			t.log.WarnContext(ctx, "cached file is damaged", "blob", d)
			t.drop(ctx, e)
		}
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
