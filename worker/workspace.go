package worker

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// workspace is where one job at a time runs: a directory that only the job's user can pass, with the
// execution root, a directory for temporary files, and the files that take the standard output and
// error. All four belong to that user.
//
// A workspace serves job after job of its user, since making and deleting even empty directories is
// what a short action would spend most of its time on. A part that the job has touched in any way
// that could reach the next one is replaced.
type workspace struct {
	base string
	uid  int // -1 is the worker's own user
	// tainted says that a process of the job may still be alive.
	tainted bool
}

func (w *workspace) root() string   { return filepath.Join(w.base, "root") }
func (w *workspace) tmp() string    { return filepath.Join(w.base, "tmp") }
func (w *workspace) stdout() string { return filepath.Join(w.base, "stdout") }
func (w *workspace) stderr() string { return filepath.Join(w.base, "stderr") }

// shut keeps the user out, whose next job runs in another workspace while this one is uploaded.
func (w *workspace) shut() error { return os.Chmod(w.base, 0o700) }

// restoreRoot makes the root again that an action of the worker's own user may have removed. It has no
// outputs then.
func (w *workspace) restoreRoot() error {
	if err := os.Mkdir(w.root(), 0o700); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// take returns a workspace with empty parts that nobody but its user has access to.
func (d *dirs) take(uid int) (*workspace, error) {
	d.mu.Lock()
	var w *workspace
	if free := d.free[uid]; len(free) > 0 {
		w, d.free[uid] = free[len(free)-1], free[:len(free)-1]
	}
	d.mu.Unlock()
	if w != nil {
		// While it lay free, an accomplice may have given descriptors of it back to the user's next action.
		if err := errors.Join(d.clean(w), os.Chmod(w.base, 0o710)); err == nil {
			return w, nil
		}
		d.discard(w.base)
	}
	w = &workspace{base: filepath.Join(d.run, d.fresh()), uid: uid}
	if err := d.make(w); err != nil {
		d.discard(w.base)
		return nil, err
	}
	return w, nil
}

func (d *dirs) make(w *workspace) error {
	if err := os.Mkdir(w.base, 0o710); err != nil {
		return err
	}
	if w.uid >= 0 {
		if err := os.Chown(w.base, -1, w.uid); err != nil {
			return err
		}
	}
	return errors.Join(w.makeDir(w.root()), w.makeDir(w.tmp()), w.makeFile(w.stdout()), w.makeFile(w.stderr()))
}

func (w *workspace) makeDir(name string) error {
	if err := os.Mkdir(name, 0o700); err != nil {
		return err
	}
	return w.own(name)
}

func (w *workspace) makeFile(name string) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), w.own(name))
}

func (w *workspace) own(name string) error {
	if w.uid < 0 {
		return nil
	}
	return os.Lchown(name, w.uid, w.uid)
}

// give takes a workspace back from a job, all of whose processes are dead.
func (d *dirs) give(w *workspace) {
	if w.tainted {
		d.discard(w.base)
		return
	}
	if err := d.clean(w); err != nil {
		//nolint:sloglint // cleaning is not bound to a job's context
		d.log.Warn("workspace can't be cleaned", "dir", filepath.Base(w.base), "err", err)
		d.discard(w.base)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free[w.uid] = append(d.free[w.uid], w)
}

// retire discards the workspaces that no job has.
func (d *dirs) retire() {
	d.mu.Lock()
	free := d.free
	d.free = map[int][]*workspace{}
	d.mu.Unlock()
	for _, workspaces := range free {
		for _, w := range workspaces {
			d.discard(w.base)
		}
	}
}

// clean keeps the user out and replaces every part that is not as it was made.
func (d *dirs) clean(w *workspace) error {
	if err := w.shut(); err != nil {
		return err
	}
	for _, name := range []string{w.root(), w.tmp()} {
		if w.pristineDir(name) {
			continue
		}
		d.discard(name)
		if err := w.makeDir(name); err != nil {
			return err
		}
	}
	for _, name := range []string{w.stdout(), w.stderr()} {
		if w.emptyFile(name) {
			continue
		}
		d.discard(name)
		if err := w.makeFile(name); err != nil {
			return err
		}
	}
	return nil
}

// pristineDir tells whether a directory is empty and has the owner, the mode and no more attributes
// than it was made with. Through a descriptor that went to another user only names can be seen.
func (w *workspace) pristineDir(name string) bool {
	fd, err := openQuietly(name, unix.O_DIRECTORY)
	if err != nil {
		return false
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	if st, ok := w.pristine(fd); !ok || st.Mode != unix.S_IFDIR|0o700 {
		return false
	}
	var entries [1024]byte // enough for one name beside "." and ".."
	for {
		n, err := unix.ReadDirent(fd, entries[:])
		if err != nil || n == 0 {
			return err == nil
		}
		// A file system may give less than all that it has room for.
		if _, _, names := unix.ParseDirent(entries[:n], 1, nil); len(names) > 0 {
			return false
		}
	}
}

// emptyFile empties a file for the next job, unless it has another name, another attribute or is still
// open somewhere: the action may have passed a descriptor to an accomplice.
func (w *workspace) emptyFile(name string) bool {
	fd, err := openQuietly(name, unix.O_NONBLOCK)
	if err != nil {
		return false
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	// The kernel grants a write lease only on a file that nobody else has open.
	if !lease(fd) {
		return false
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		return false
	}
	st, ok := w.pristine(fd)
	if !ok || st.Mode != unix.S_IFREG|0o600 || st.Nlink != 1 {
		return false
	}
	return st.Size == 0 || os.Truncate(name, 0) == nil
}

// lease takes a write lease. A process that another slot is just starting has what this worker has open
// until it executes its command.
func lease(fd int) bool {
	for range leaseTries {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
		if err == nil {
			return true
		}
		if !errors.Is(err, unix.EAGAIN) {
			return false
		}
		<-time.NewTimer(leasePause).C
	}
	return false
}

const (
	leaseTries = 4
	leasePause = 500 * time.Microsecond
)

// openQuietly opens for reading without what os.OpenFile does for files that are waited for.
func openQuietly(name string, flags int) (int, error) {
	for {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// pristine tells whether a file has the owner and the attributes that it was made with.
func (w *workspace) pristine(fd int) (st unix.Stat_t, ok bool) {
	if err := unix.Fstat(fd, &st); err != nil || (w.uid >= 0 && int(st.Uid) != w.uid) {
		return st, false
	}
	n, err := unix.Flistxattr(fd, nil)
	return st, n == 0 && (err == nil || errors.Is(err, unix.ENOTSUP))
}
