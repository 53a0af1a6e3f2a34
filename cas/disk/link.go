package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Link makes dst a file with the blob's content and mode 0444 or, when executable, 0555. It is a
// hard link of the cached file, which is fetched first when it is not held, so nobody may be given
// the right to write it: under root it belongs to root. On another file system, or where links are
// not allowed, dst is a copy. The empty blob is always a new file, because it would be the one with
// the most links and the most to lose.
//
// The error wraps cas.ErrNotFound when the source has no such blob, fs.ErrExist when dst exists,
// and what the source says otherwise.
func (t *Tier) Link(ctx context.Context, d digest.Digest, executable bool, dst string) error {
	if d.IsEmpty() {
		return create(dst, mode(executable))
	}
	return t.with(ctx, d, executable, func(path string) error {
		err := os.Link(path, dst)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, fs.ErrPermission) || errors.Is(err, errors.ErrUnsupported) {
			return copyFile(ctx, path, dst, mode(executable))
		}
		return err
	})
}

// Copy is Link with a file of its own that the caller may write: mode 0644 or, when executable,
// 0755.
func (t *Tier) Copy(ctx context.Context, d digest.Digest, executable bool, dst string) error {
	m := mode(executable) | 0o200
	if d.IsEmpty() {
		return create(dst, m)
	}
	return t.with(ctx, d, t.variant(d, executable), func(path string) error {
		return copyFile(ctx, path, dst, m)
	})
}

// variant is the one whose bytes can be had without making it, else preferred.
func (t *Tier) variant(d digest.Digest, preferred bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fresh(d, preferred) || !t.fresh(d, !preferred) {
		return preferred
	}
	return !preferred
}

// fresh reports whether there is a file that can be used at once; t.mu must be held.
func (t *Tier) fresh(d digest.Digest, executable bool) bool {
	e, ok := t.index.get(t.keyOf(d, executable))
	return ok && e.size == d.Size() && e.generation >= t.trusted
}

// with calls use with the path of a file that has the blob's content, fetched when it is not held.
// The file may be deleted at any time; with finds out when use fails, and tries again. A blob that
// is larger than the tier, or that is evicted again and again before its use, gets a file for this
// call only.
func (t *Tier) with(ctx context.Context, d digest.Digest, executable bool, use func(path string) error) error {
	if d.IsImpossible() {
		return fmt.Errorf("%w: %v", cas.ErrNotFound, d)
	}
	for range attempts {
		if cost(d.Size()) > t.max {
			break
		}
		e, held, err := t.obtain(ctx, d, executable)
		if err != nil {
			return err
		}
		if !held {
			continue
		}
		path := t.path(e)
		err = use(path)
		switch {
		case errors.Is(err, unix.EMLINK):
			if err := t.recreate(ctx, e, d); err != nil {
				return err
			}
		case errors.Is(err, fs.ErrNotExist) && gone(path):
			t.drop(ctx, e)
		default:
			return err
		}
	}
	return t.once(ctx, d, executable, use)
}

func gone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// recreate replaces a file that can have no more links by a copy.
func (t *Tier) recreate(ctx context.Context, e entry, d digest.Digest) error {
	part, err := t.begin(ctx, d)
	if err != nil {
		return err
	}
	if !t.replay(ctx, e, part, part.seen) {
		part.discard(ctx, t)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil // The file was dropped, which is as good.
	}
	_, err = t.seal(ctx, part, e.key)
	return err
}

// once fetches the blob into a file that is deleted after use.
func (t *Tier) once(ctx context.Context, d digest.Digest, executable bool, use func(path string) error) error {
	select {
	case t.fetching <- struct{}{}:
		defer func() { <-t.fetching }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	file, err := t.temp() // No room is reserved: that could evict everything else.
	if err != nil {
		return err
	}
	part := &partial{file: file, seen: cas.NewVerifier(d)}
	defer part.discard(ctx, t)
	if err := t.download(ctx, part, d); err != nil {
		return err
	}
	if err := part.file.Chmod(mode(executable)); err != nil {
		return err
	}
	return use(part.file.Name())
}

// create makes an empty file.
func create(dst string, m os.FileMode) error {
	f, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Chmod(m), f.Close())
}

// copyFile makes dst a copy of src, in the kernel where it can. On an error there is no dst.
func copyFile(ctx context.Context, src, dst string, m os.FileMode) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = copyAll(ctx, out, in)
	if err == nil {
		err = out.Chmod(m)
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(err, os.Remove(dst))
	}
	return nil
}
