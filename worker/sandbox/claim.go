package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// errTaken reports a user ID that another slot of this host has.
var errTaken = errors.New("user ID is in use by another slot")

// openLockDir makes the directory of the lock files and kills what the slots of dead workers left.
func (p *Pool) openLockDir() error {
	base := "/run/lock"
	if info, err := os.Stat(base); err != nil || !info.IsDir() {
		base = os.TempDir()
	}
	dir := filepath.Join(base, "jetfarm")
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || st.Uid != 0 || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s must be a directory that only root can write to", dir)
	}
	p.lockDir = dir
	return p.sweepAbandoned()
}

// sweepAbandoned kills the processes of every slot whose worker is gone.
func (p *Pool) sweepAbandoned() error {
	entries, err := os.ReadDir(p.lockDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		uid, err := strconv.Atoi(strings.TrimPrefix(e.Name(), "slot-"))
		if err != nil || uid < p.first || uid >= p.first+MaxSlots {
			continue
		}
		lock, err := p.claim(uid)
		if errors.Is(err, errTaken) {
			continue
		}
		if err != nil {
			return err
		}
		err = sweepUID(uid, p.killer())
		if err := errors.Join(err, lock.Close()); err != nil {
			return err
		}
	}
	return nil
}

// killer is the user ID of the threads that kill. No process has it.
func (p *Pool) killer() int { return p.first + MaxSlots }

// newSlot claims a user ID if the mode has them.
func (p *Pool) newSlot() (*Slot, error) {
	if p.mode == ModeNone {
		return &Slot{pool: p, uid: -1}, nil
	}
	for uid := p.first; uid < p.first+MaxSlots; uid++ {
		if _, err := user.LookupId(strconv.Itoa(uid)); err == nil {
			continue
		}
		lock, err := p.claim(uid)
		if errors.Is(err, errTaken) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := sweepUID(uid, p.killer()); err != nil {
			return nil, errors.Join(err, lock.Close())
		}
		return &Slot{pool: p, uid: uid, lock: lock}, nil
	}
	return nil, fmt.Errorf("all user IDs from %d to %d are in use", p.first, p.first+MaxSlots-1)
}

// claim locks a user ID for as long as the file is open, thus at most until this process ends.
func (p *Pool) claim(uid int) (*os.File, error) {
	name := filepath.Join(p.lockDir, "slot-"+strconv.Itoa(uid))
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errTaken
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
	}
	return f, nil
}
