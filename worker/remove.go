package worker

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// removeDepth is how deep remove descends with descriptors open. What is deeper is moved up first.
	removeDepth = 64
	// removeRounds is how often a directory is emptied again into which somebody still puts things.
	removeRounds = 100
)

// remove deletes what has a name in the directory top: a tree that untrusted code made, of which other
// untrusted code may hold descriptors. It goes from descriptor to descriptor and never follows a
// symbolic link, however the tree changes meanwhile. A part that is too deep to be deleted at once is
// moved to top under a name from fresh, and is there when remove returns.
func remove(top *os.File, name string, fresh func() string) error {
	r := remover{top: top, fresh: fresh}
	return r.remove(top, name, 0)
}

type remover struct {
	top   *os.File
	fresh func() string
}

func (r *remover) remove(parent *os.File, name string, depth int) error {
	err := unix.Unlinkat(int(parent.Fd()), name, 0)
	if !errors.Is(err, unix.EISDIR) {
		return unlessGone(err)
	}
	if os.Geteuid() != 0 {
		// A worker that is not root is the user who made the tree, and needs the rights to it that the
		// owner may have taken away.
		if err := unix.Fchmodat(int(parent.Fd()), name, 0o700, 0); err != nil {
			return unlessGone(err)
		}
	}
	if depth == removeDepth {
		return unlessGone(unix.Renameat(int(parent.Fd()), name, int(r.top.Fd()), r.fresh()))
	}
	dir, err := openDirAt(parent, name)
	if err != nil {
		return unlessGone(err)
	}
	defer dir.Close() //nolint:errcheck // nothing was written
	for range removeRounds {
		if err := r.empty(dir, depth+1); err != nil {
			return err
		}
		err = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
		if !errors.Is(err, unix.ENOTEMPTY) {
			return unlessGone(err)
		}
	}
	return fmt.Errorf("directory %q does not stay empty: %w", name, err)
}

// empty deletes what is in a directory at the moment.
func (r *remover) empty(dir *os.File, depth int) error {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return err
	}
	for {
		names, err := dir.Readdirnames(256)
		for _, name := range names {
			if err := r.remove(dir, name, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// openDirAt opens a directory to be emptied.
func openDirAt(parent *os.File, name string) (*os.File, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(int(parent.Fd()), name, flags, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func unlessGone(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
