package outputs

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// openTries is how often a file is tried to be opened that somebody holds a lease on. The pauses between
// the tries are less than a second together, whereas the kernel breaks a lease after 45 seconds: the
// processes of the action are dead, so only an accomplice can hold one.
const openTries = 20

// open opens what is at path below the directory root. No component is followed if it is a symbolic
// link; the last one may be one with O_PATH, and then is what is opened. A file on which somebody keeps a lease is
// ErrRefused; opening one that is no regular file blocks unless flags have O_NONBLOCK.
func open(ctx context.Context, root *os.File, path string, flags int) (*os.File, error) {
	if path == "" {
		path = "."
	}
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW), //nolint:gosec // flags are not negative
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	for try := 1; ; {
		fd, err := unix.Openat2(int(root.Fd()), path, &how)
		switch {
		case errors.Is(err, unix.EINTR) && ctx.Err() == nil:
			continue
		case errors.Is(err, unix.EAGAIN) && try == openTries:
			return nil, leased(path)
		case errors.Is(err, unix.EAGAIN):
			if err := pause(ctx, try); err != nil {
				return nil, err
			}
			try++
			continue
		case err != nil:
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// openOwn opens a regular file of the worker's own. It does not wait for a lease on it to be broken.
func openOwn(name string, flags int) (*os.File, error) {
	f, err := os.OpenFile(name, flags|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EAGAIN) {
		return nil, leased(name)
	}
	return f, err
}

func leased(path string) error {
	return fmt.Errorf("%w: %s can't be opened, a process that is not the action's has a lease on it", ErrRefused, digest.Quote(path))
}

// pause waits before try+1: full jitter below an exponential bound of at most 64 milliseconds.
func pause(ctx context.Context, try int) error {
	bound := time.Millisecond << min(try, 6)
	timer := time.NewTimer(rand.N(bound)) //nolint:gosec // jitter needs no secrecy
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// openFor opens path for reading, and gives the owner the right to read it first when the action took
// it away (row EXO-32). entry is the same opened with O_PATH.
func openFor(ctx context.Context, root, entry *os.File, path string, flags int) (*os.File, error) {
	f, err := open(ctx, root, path, unix.O_RDONLY|unix.O_NONBLOCK|flags)
	if !errors.Is(err, unix.EACCES) {
		return f, err
	}
	if err := os.Chmod("/proc/self/fd/"+strconv.Itoa(int(entry.Fd())), 0o700); err != nil {
		return nil, err
	}
	return open(ctx, root, path, unix.O_RDONLY|unix.O_NONBLOCK|flags)
}

// isAbsent tells an error of open that means that nothing is at the path: it does not exist, or one of
// its parents is not a directory but a file or a symbolic link.
func isAbsent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV)
}

func stat(f *os.File) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return st, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st, nil
}

// identity tells a file in the state in which it was sealed from any other: every change of content,
// mode, owner or attributes changes at least its ctime.
type identity struct {
	dev, ino uint64
	size     int64
	changed  unix.Timespec
	uid      uint32
	mode     uint32
}

func identityOf(st unix.Stat_t) identity {
	//nolint:unconvert // the width of dev depends on the architecture
	return identity{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, changed: st.Ctim, uid: st.Uid, mode: st.Mode}
}

// isBare tells whether a file has neither an access control list nor other extended attributes.
func isBare(f *os.File) bool {
	n, err := unix.Flistxattr(int(f.Fd()), nil)
	return n <= 0 && (err == nil || errors.Is(err, unix.ENOTSUP))
}

func readlink(f *os.File) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", b)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: f.Name(), Err: err}
	}
	return string(b[:n]), nil
}

// special names a kind of file that is neither regular nor a directory nor a symbolic link.
func special(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFIFO:
		return "a named pipe"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "a device"
	}
	return fmt.Sprintf("of the unknown kind %o", mode&unix.S_IFMT)
}
