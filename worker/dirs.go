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
	err := os.Rename(name, filepath.Join(d.trash, d.fresh()))
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
		if err := d.emptyOnce(); err != nil {
			d.log.WarnContext(ctx, "trash can't be deleted", "err", err)
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

// emptyOnce deletes what is in trash, and what comes up from the depth of it.
func (d *dirs) emptyOnce() (err error) {
	trash, err := os.Open(d.trash)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, trash.Close()) }()
	for {
		names, err := os.ReadDir(d.trash)
		if err != nil || len(names) == 0 {
			return err
		}
		var errs []error
		for _, n := range names {
			errs = append(errs, remove(trash, n.Name(), d.fresh))
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
}

// fresh returns a name that nothing in run or trash has.
func (d *dirs) fresh() string { return strconv.FormatUint(d.last.Add(1), 10) }

func (d *dirs) close() error { return d.lock.Close() }
