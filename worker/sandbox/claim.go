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
		files, err := writeAccounts(p.lockDir, uid)
		if err != nil {
			return nil, errors.Join(err, lock.Close())
		}
		return &Slot{pool: p, uid: uid, lock: lock, files: files}, nil
	}
	return nil, fmt.Errorf("all user IDs from %d to %d are in use", p.first, p.first+MaxSlots-1)
}

// claim is the exclusive right to a user ID. It ends with its descriptors, thus at most with this
// process. The locked file tells the workers that come later which users there have been; the name of
// the socket, which is no file, also excludes workers that see another /run, as in a chroot.
type claim struct{ file, name *os.File }

// Close gives the user ID free.
func (c *claim) Close() error { return errors.Join(c.name.Close(), c.file.Close()) }

func (p *Pool) claim(uid int) (*claim, error) {
	file, err := p.lockFile(uid)
	if err != nil {
		return nil, err
	}
	name, err := bindName("@jetfarm/slot-" + strconv.Itoa(uid))
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &claim{file: file, name: name}, nil
}

func bindName(name string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: name})
	if errors.Is(err, unix.EADDRINUSE) {
		err = errTaken
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("bind %s: %w", name, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (p *Pool) lockFile(uid int) (*os.File, error) {
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
