package outputs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker/contain"
)

// uploadParallel is how many blobs of one collection are uploaded at once.
const uploadParallel = 16

// stream adds a file of the worker's own as a blob.
func (c *Collection) stream(space digest.Space, name string, limit int64) (*repb.Digest, error) {
	f, err := openOwn(name, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file: %s", name, info.Mode())
	}
	size := info.Size()
	if limit > 0 && size > limit {
		if err := f.Truncate(limit); err != nil {
			return nil, err
		}
		size = limit
	}
	h := space.Function().New()
	n, err := io.Copy(h, io.LimitReader(f, size+1))
	if err != nil {
		return nil, err
	}
	if n != size {
		return nil, fmt.Errorf("%s changed its size from %d to %d while it was hashed", name, size, n)
	}
	d := space.Sum(h, n)
	c.add(d, blob{path: name})
	return d.Proto(), nil
}

// Upload makes every blob of a collection durable: those that the store does not have are put there.
// Files are offered to the disk tier on the way, whose refusal is no error. A file that is not what was
// hashed any more is not offered, and ErrRefused when the store needs it.
func (c *Collector) Upload(ctx context.Context, from *Collection) error {
	missing := map[digest.Digest]bool{}
	if len(from.order) > 0 {
		ds, err := c.Blobs.Missing(ctx, from.order)
		if err != nil {
			return err
		}
		for _, d := range ds {
			missing[d] = true
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(uploadParallel)
	for _, d := range from.order {
		b := from.blobs[d]
		if !missing[d] && !b.adopt {
			continue
		}
		g.Go(contain.Panics(func() error {
			if err := c.upload(ctx, from, d, b, missing[d]); err != nil {
				return fmt.Errorf("upload %s: %w", d.Blob(), err)
			}
			return nil
		}))
	}
	return g.Wait()
}

func (c *Collector) upload(ctx context.Context, from *Collection, d digest.Digest, b blob, missing bool) (err error) {
	if b.data != nil {
		return c.Blobs.Put(ctx, d, bytes.NewReader(b.data))
	}
	f, err := b.open(ctx, from.root)
	switch {
	case err != nil && !missing:
		return nil // it was to be adopted, which nobody depends on
	case isAbsent(err):
		return changed(b.path)
	case err != nil:
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if missing {
		if err := c.put(ctx, d, f); err != nil {
			return err
		}
	}
	if !b.adopt {
		return nil
	}
	// The tier does not hash what it adopts, and the path may lead to another file by now.
	if st, err := stat(f); err == nil && identityOf(st) == b.identity {
		_ = c.Files.Adopt(ctx, d, b.executable, f) //nolint:errcheck // what the tier does not take it fetches when it needs it
	}
	return nil
}

func (b blob) open(ctx context.Context, root *os.File) (*os.File, error) {
	if filepath.IsAbs(b.path) {
		return openOwn(b.path, os.O_RDONLY)
	}
	return open(ctx, root, b.path, unix.O_RDONLY|unix.O_NONBLOCK)
}

// put stores a file, whose bytes the store verifies.
func (c *Collector) put(ctx context.Context, d digest.Digest, f *os.File) error {
	st, err := stat(f)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return changed(f.Name())
	}
	if err = c.Blobs.Put(ctx, d, f); errors.Is(err, cas.ErrMismatch) {
		return changed(f.Name())
	}
	return err
}

func changed(path string) error {
	return fmt.Errorf("%w: %s was changed after it was hashed", ErrRefused, digest.Quote(path))
}
