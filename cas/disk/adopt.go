package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Adopt takes a finished file into the tier: as a link of the same inode, which becomes read-only
// and, under root, root's; or else, also when it has extended attributes, as a copy. The caller vouches that the content has the digest and
// that nobody has the file open for writing or will write to it. A file whose size is not the
// digest's is cas.ErrMismatch. A blob that is held, that is empty or larger than the tier is left
// alone. Adopting spares a later fetch and nothing else: an error may be ignored.
func (t *Tier) Adopt(ctx context.Context, d digest.Digest, executable bool, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() != d.Size() || d.IsImpossible() {
		return fmt.Errorf("%w: adopting %s of %d bytes as %v", cas.ErrMismatch, info.Mode(), info.Size(), d)
	}
	if d.IsEmpty() || cost(d.Size()) > t.max {
		return nil
	}
	t.mu.Lock()
	k := t.keyOf(d, executable)
	held := t.fresh(d, executable)
	t.mu.Unlock()
	if held {
		return nil
	}
	t.reserve(ctx, d.Size())
	e := entry{key: k, size: d.Size(), generation: t.generations.Add(1)}
	if err := t.own(f, executable); err == nil {
		// linkat with AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH.
		self := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
		if unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, t.path(e), unix.AT_SYMLINK_FOLLOW) == nil {
			t.insert(ctx, e)
			return nil
		}
	}
	t.release(d.Size())
	return t.adoptCopy(ctx, k, d, f)
}

// own takes the right to write the inode from whoever made it. The owner goes first: it could undo
// the mode. An inode with extended attributes is not taken: they would stay, and an access control list
// is one of them.
func (t *Tier) own(f *os.File, executable bool) error {
	if n, err := unix.Flistxattr(int(f.Fd()), nil); n > 0 || err != nil && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("%d bytes of extended attributes: %w", n, errors.Join(err, unix.EPERM))
	}
	if t.asRoot {
		if err := f.Chown(0, 0); err != nil {
			return err
		}
	}
	return f.Chmod(mode(executable))
}

func (t *Tier) adoptCopy(ctx context.Context, k key, d digest.Digest, f *os.File) error {
	part, err := t.begin(ctx, d)
	if err != nil {
		return err
	}
	err = copyAll(ctx, part, io.NewSectionReader(f, 0, d.Size()))
	if err = errors.Join(err, part.seen.Verdict()); err != nil {
		part.discard(ctx, t)
		return err
	}
	_, err = t.seal(ctx, part, k)
	return err
}
