package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// mountpoints are the places where the execution root may appear in ModeNamespaces, in the order of
// preference. None is below a directory that is private to a run.
func mountpoints() []string {
	return []string{"/run/jetfarm/root", "/var/lib/jetfarm/root", "/jetfarm/root"}
}

// try does on a thread what a run in the mode does, up to becoming the slot's user and writing to the
// execution root.
func (p *Pool) try(m Mode, dir string) (err error) {
	if m == ModeNone {
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("the worker does not run as root")
	}
	if p.lockDir == "" {
		if err := p.openLockDir(); err != nil {
			return err
		}
	}
	if len(p.all) == 0 {
		s, err := p.newSlot()
		if err != nil {
			return err
		}
		p.all = append(p.all, s)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if m == ModeNamespaces {
		if p.mountpoint, err = makeMountpoint(); err != nil {
			return err
		}
	}
	return p.all[0].probe(m, dir)
}

func makeMountpoint() (string, error) {
	var errs []error
	for _, m := range mountpoints() {
		err := os.MkdirAll(m, 0o755)
		if err == nil {
			return m, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// Probe does on a thread what a run does, up to becoming the slot's user and writing to an execution root
// below dir.
func (s *Slot) Probe(dir string) error {
	if s.pool.mode == ModeNone {
		return nil
	}
	return s.probe(s.pool.mode, dir)
}

func (s *Slot) probe(m Mode, dir string) (err error) {
	base, err := os.MkdirTemp(dir, "probe-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(base)) }()
	root, scratch := filepath.Join(base, "root"), filepath.Join(base, "tmp")
	for _, d := range []string{root, scratch} {
		if err := errors.Join(os.Mkdir(d, 0o755), os.Chown(d, s.uid, s.uid)); err != nil {
			return err
		}
	}
	if err := errors.Join(os.Chmod(base, 0o710), os.Chown(base, 0, s.uid)); err != nil {
		return err
	}
	return onThread(func() error {
		seen := root
		if m == ModeNamespaces {
			if err := s.enter(root, scratch); err != nil {
				return err
			}
			seen = s.pool.mountpoint
		} else if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := becomeThread(s.uid); err != nil {
			return err
		}
		return reach(seen)
	})
}

// reach creates a file in dir as the thread's user.
func reach(dir string) error {
	name := filepath.Join(dir, "probe")
	fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("the slot's user can't write to %s, is a directory above closed to it: %w", dir, err)
	}
	return unix.Close(fd)
}

// becomeThread makes uid the user, group and only group of the calling thread.
func becomeThread(uid int) error {
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return fmt.Errorf("setgroups: %w", e)
	}
	id := uintptr(uid)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); e != 0 {
		return fmt.Errorf("setresgid: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); e != 0 {
		return fmt.Errorf("setresuid: %w", e)
	}
	return nil
}
