package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// dirs are the directories below the worker's own: one in run for each job, and trash, to which
// what a job leaves moves in one step and from which it is deleted in the background.
type dirs struct {
	run, trash string
	log        *slog.Logger
	lock       *os.File
	last       atomic.Uint64
	wake       chan struct{}

	mu   sync.Mutex
	free map[int][]*workspace // guarded by mu; by the user they belong to
}

// openDirs makes the directories and moves everything that an earlier worker left to trash. It fails
// when another worker uses them.
func openDirs(dir string, log *slog.Logger) (*dirs, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	d := &dirs{run: filepath.Join(dir, "run"), trash: filepath.Join(dir, "trash"), log: log, wake: make(chan struct{}, 1), free: map[int][]*workspace{}}
	if d.lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if err := d.prepare(); err != nil {
		return nil, errors.Join(err, d.lock.Close())
	}
	return d, nil
}

func (d *dirs) prepare() error {
	if err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%s is in use by another worker: %w", filepath.Dir(d.run), err)
	}
	// Jobs' directories are closed to other users, so run may be passed by everybody.
	if err := errors.Join(os.MkdirAll(d.run, 0o711), os.Chmod(d.run, 0o711), os.MkdirAll(d.trash, 0o700)); err != nil {
		return err
	}
	for _, parent := range []string{d.trash, d.run} {
		names, err := os.ReadDir(parent)
		if err != nil {
			return err
		}
		for _, n := range names {
			if at, err := strconv.ParseUint(n.Name(), 10, 64); err == nil && at > d.last.Load() {
				d.last.Store(at)
			}
		}
		if parent == d.run {
			for _, n := range names {
				d.discard(filepath.Join(parent, n.Name()))
			}
		}
	}
	d.wakeUp()
	return nil
}

// discard moves a directory out of the way.
func (d *dirs) discard(name string) {
	err := os.Rename(name, filepath.Join(d.trash, strconv.FormatUint(d.last.Add(1), 10)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		//nolint:sloglint // discarding is not bound to a job's context
		d.log.Warn("directory can't be moved to trash", "dir", filepath.Base(name), "err", err)
	}
	d.wakeUp()
}

func (d *dirs) wakeUp() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// empty deletes what is in trash until ctx ends, and once more then.
func (d *dirs) empty(ctx context.Context) {
	for {
		names, err := os.ReadDir(d.trash)
		if err != nil {
			d.log.WarnContext(ctx, "trash can't be read", "err", err)
		}
		for _, n := range names {
			if err := remove(filepath.Join(d.trash, n.Name())); err != nil {
				d.log.WarnContext(ctx, "trash can't be deleted", "err", err)
			}
		}
		select {
		case <-d.wake:
			continue
		default:
		}
		select {
		case <-d.wake:
		case <-ctx.Done():
			return
		}
	}
}

func (d *dirs) close() error { return d.lock.Close() }

// remove deletes a tree that untrusted code made: one whose directories forbid it to their owner, or
// are so deep that they can't be opened all at once.
func remove(name string) error {
	for range 1000 {
		err := os.RemoveAll(name)
		if err == nil {
			return nil
		}
		if !unlock(name) && !flatten(name) {
			return err
		}
	}
	return fmt.Errorf("%s is too deep to be deleted", filepath.Base(name))
}

// unlock makes every directory of a tree writable for its owner and tells whether it changed one.
func unlock(name string) (changed bool) {
	//nolint:errcheck // what can't be read now is tried again after the change
	_ = filepath.WalkDir(name, func(path string, e fs.DirEntry, _ error) error {
		if e == nil || !e.IsDir() {
			return nil
		}
		if info, statErr := os.Lstat(path); statErr == nil && info.Mode().Perm()&0o700 != 0o700 {
			changed = os.Chmod(path, 0o700) == nil || changed
		}
		return nil
	})
	return changed
}

// flatten moves a directory that is deep in a tree to its top and tells whether it did.
func flatten(name string) bool {
	const deep = 200
	at := name
	for range deep {
		entries, err := os.ReadDir(at)
		if err != nil {
			return false
		}
		next := ""
		for _, e := range entries {
			if e.IsDir() {
				next = filepath.Join(at, e.Name())
				break
			}
		}
		if next == "" {
			return false
		}
		at = next
	}
	top, err := os.MkdirTemp(name, "deep-*")
	return err == nil && os.Rename(at, filepath.Join(top, "x")) == nil
}
