package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultPath is the PATH of a command whose environment has none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// start starts the command from the calling thread, which it changes: the thread must be one of
// onThread, and live as long as the command, which dies with it.
func (s *Slot) start(spec Spec) (*os.Process, error) {
	root := spec.Root
	if s.pool.mode == ModeNamespaces {
		if err := s.enter(spec.Root, spec.Scratch); err != nil {
			return nil, fmt.Errorf("set up the sandbox: %w", err)
		}
		root = s.pool.mountpoint
	} else if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	unix.Umask(0o022)
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("no_new_privs: %w", err)
	}
	dir := filepath.Join(root, filepath.FromSlash(spec.Dir))
	env := s.environment(spec)
	names, err := find(spec.Args[0], dir, env)
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close() //nolint:errcheck // nothing was written
	attr := &os.ProcAttr{
		Dir:   dir,
		Env:   env,
		Files: []*os.File{null, spec.Stdout, spec.Stderr},
		Sys:   &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	}
	if s.uid >= 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: uint32(s.uid), Gid: uint32(s.uid)} //nolint:gosec // not negative here
	}
	return spawnFirst(names, spec.Args, attr)
}

// spawnFirst starts the first executable that the command's user can reach, which is not known before:
// the worker may enter directories that the user may not.
func spawnFirst(names, args []string, attr *os.ProcAttr) (proc *os.Process, err error) {
	for _, name := range names {
		if proc, err = spawn(name, args, attr); !errors.Is(err, unix.EACCES) {
			return proc, err
		}
	}
	return nil, err
}

// spawn starts a process. A file that is just being written in another thread's child, between its
// fork and its exec, can't be executed for that moment, so that is tried again.
func spawn(name string, args []string, attr *os.ProcAttr) (*os.Process, error) {
	for pause := time.Millisecond; ; pause *= 2 {
		proc, err := os.StartProcess(name, args, attr)
		switch {
		case err == nil:
			return proc, nil
		case errors.Is(err, unix.ETXTBSY) && pause < time.Second:
			wait(pause)
			continue
		}
		var errno syscall.Errno
		if errors.As(err, &errno) && slices.Contains(commandErrors(), errno) {
			text := error(errno)
			if errno == unix.ENOENT {
				text = fmt.Errorf("%w (the file or its interpreter)", errno)
			}
			return nil, &SpawnError{Path: name, Err: text}
		}
		return nil, fmt.Errorf("start %q: %w", name, err)
	}
}

// commandErrors are the errors of execve that say something about the file or the arguments.
func commandErrors() []syscall.Errno {
	return []syscall.Errno{
		unix.ENOENT, unix.EACCES, unix.ENOEXEC, unix.E2BIG, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG,
		unix.EISDIR, unix.ELIBBAD, unix.EINVAL, unix.ETXTBSY,
	}
}

func (s *Slot) environment(spec Spec) []string {
	env := slices.Clone(spec.Env)
	if _, ok := lookup(env, "PATH"); !ok {
		env = append(env, "PATH="+DefaultPath)
	}
	if _, ok := lookup(env, "TMPDIR"); !ok && s.pool.mode != ModeNamespaces {
		env = append(env, "TMPDIR="+spec.Scratch)
	}
	return env
}

func lookup(env []string, name string) (string, bool) {
	for _, e := range env {
		if value, ok := strings.CutPrefix(e, name+"="); ok {
			return value, true
		}
	}
	return "", false
}

// find resolves the name of an executable as the command's own shell would do it in dir, and returns
// what PATH has of that name, at least one. What has a slash is left for execve, which looks at it from
// dir.
func find(name, dir string, env []string) ([]string, error) {
	if strings.Contains(name, "/") {
		return []string{name}, nil
	}
	var found []string
	value, _ := lookup(env, "PATH")
	for element := range strings.SplitSeq(value, ":") {
		candidate := path.Join(element, name)
		if element == "" || !strings.Contains(candidate, "/") {
			candidate = "./" + candidate
		}
		at := candidate
		if !path.IsAbs(at) {
			at = filepath.Join(dir, at)
		}
		if info, err := os.Stat(at); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			found = append(found, candidate)
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	return nil, &SpawnError{Path: name, Err: fmt.Errorf("%w in PATH %q", fs.ErrNotExist, value)}
}

// exitCode is the status as a shell says it, and the signal that ended the command.
func exitCode(state *os.ProcessState) (int, syscall.Signal) {
	if w, ok := state.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return 128 + int(w.Signal()), w.Signal()
	}
	return state.ExitCode(), 0
}

// keepFiles keeps the files that whoever started this process left open from its actions. Those that are
// opened by Go are kept anyway. On kernels before 5.11 nothing happens.
func keepFiles() {
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) //nolint:errcheck // see above
}
