package outputs

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// open opens what is at path below the directory root. No component is followed if it is a symbolic
// link; the last one may be one with O_PATH, and then is what is opened.
func open(root *os.File, path string, flags int) (*os.File, error) {
	if path == "" {
		path = "."
	}
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW), //nolint:gosec // flags are not negative
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	for {
		fd, err := unix.Openat2(int(root.Fd()), path, &how)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// openFor opens path for reading, and gives the owner the right to read it first when the action took
// it away (row EXO-32). entry is the same opened with O_PATH.
func openFor(root, entry *os.File, path string, flags int) (*os.File, error) {
	f, err := open(root, path, unix.O_RDONLY|unix.O_NONBLOCK|flags)
	if !errors.Is(err, unix.EACCES) {
		return f, err
	}
	if err := os.Chmod("/proc/self/fd/"+strconv.Itoa(int(entry.Fd())), 0o700); err != nil {
		return nil, err
	}
	return open(root, path, unix.O_RDONLY|unix.O_NONBLOCK|flags)
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
