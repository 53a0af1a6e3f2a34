package sandbox

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// process is one line of the process table.
type process struct {
	pid, ppid, pgrp, session int
	uid                      int
	zombie                   bool
	started                  string // in clock ticks since the machine's boot: with pid it is unique
}

// processes reads the process table. Processes that end meanwhile may be missing.
func processes() []process {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close() //nolint:errcheck // nothing was written
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	ps := make([]process, 0, len(names))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, ok := readProcess(pid); ok {
			ps = append(ps, p)
		}
	}
	return ps
}

func readProcess(pid int) (process, bool) {
	base := "/proc/" + strconv.Itoa(pid)
	var st syscall.Stat_t
	if err := syscall.Stat(base, &st); err != nil {
		return process{}, false
	}
	b, err := os.ReadFile(base + "/stat")
	if err != nil {
		return process{}, false
	}
	// The command name is in parentheses and may contain anything, also parentheses.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return process{}, false
	}
	p := process{pid: pid, uid: int(st.Uid), zombie: fields[0][0] == 'Z' || fields[0][0] == 'X', started: string(fields[19])}
	for i, to := range []*int{&p.ppid, &p.pgrp, &p.session} {
		if *to, err = strconv.Atoi(string(fields[i+1])); err != nil {
			return process{}, false
		}
	}
	return p, true
}

// reapUser tells whether a process of the user is alive, and collects the exit statuses of those that
// are dead and whose orphans' parent this process is. A command that Run waits for must not be among
// them.
func reapUser(uid int) (alive bool) {
	for _, p := range processes() {
		switch {
		case p.uid != uid:
		case p.zombie:
			reap(p)
		default:
			alive = true
		}
	}
	return alive
}

// reap collects the exit status of a dead orphan if this process is the one that adopts orphans, as
// the first process of a container does. Waiting for a single process takes no status from anyone else
// who waits.
func reap(p process) {
	self := os.Getpid()
	if p.ppid != self {
		return
	}
	var subreaper int32
	if self != 1 {
		err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&subreaper)), 0, 0, 0)
		if err != nil || subreaper == 0 {
			return
		}
	}
	_ = unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOHANG, nil) //nolint:errcheck // somebody else may have been faster
}

// family finds the processes of one command by what can be seen of them. It is for ModeNone only.
type family struct {
	leader int            // the command itself, leader of its session and process group
	dir    string         // the execution root; "" for none
	files  []string       // where standard output and error go
	seen   map[int]string // members found so far, with their start
}

func newFamily(spec Spec, leader int) *family {
	return &family{
		leader: leader, dir: spec.Root, files: []string{spec.Stdout.Name(), spec.Stderr.Name()}, seen: map[int]string{},
	}
}

// find returns the living members. Whoever was one stays one for as long as its parent is known by it.
func (f *family) find() []process {
	ps := processes()
	byPID := make(map[int]process, len(ps))
	for _, p := range ps {
		byPID[p.pid] = p
	}
	self := os.Getpid()
	var found []process
	for _, p := range ps {
		if p.pid == self || p.uid != os.Geteuid() {
			continue
		}
		if f.member(p, byPID, self) {
			f.seen[p.pid] = p.started
			if !p.zombie {
				found = append(found, p)
			} else if p.pid != f.leader {
				reap(p)
			}
		}
	}
	return found
}

func (f *family) member(p process, byPID map[int]process, self int) bool {
	for at, depth := p, 0; depth < 64; depth++ {
		if at.pid == f.leader || (f.leader != 0 && (at.session == f.leader || at.pgrp == f.leader)) || f.seen[at.pid] == at.started {
			return true
		}
		parent, ok := byPID[at.ppid]
		if !ok || parent.pid == self || parent.pid == 1 {
			break
		}
		at = parent
	}
	return f.uses(p)
}

// uses tells whether a process works in the execution root or writes to the command's output.
func (f *family) uses(p process) bool {
	base := "/proc/" + strconv.Itoa(p.pid)
	if cwd, err := os.Readlink(base + "/cwd"); err == nil && f.dir != "" {
		if cwd == f.dir || strings.HasPrefix(cwd, f.dir+string(filepath.Separator)) {
			return true
		}
	}
	for _, fd := range []string{"1", "2"} {
		to, err := os.Readlink(base + "/fd/" + fd)
		for _, name := range f.files {
			if err == nil && to == name {
				return true
			}
		}
	}
	return false
}

// sweep kills the members until none is found.
func (f *family) sweep() error {
	deadline := time.Now().Add(sweepBound)
	for pause := 200 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		if f.kill() == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("processes of the command are still there after they were killed")
		}
		wait(pause)
	}
}

// kill sends SIGKILL to the members and returns how many there were.
func (f *family) kill() int {
	if f.leader != 0 {
		_ = unix.Kill(-f.leader, unix.SIGKILL)
	}
	members := f.find()
	for _, p := range members {
		_ = unix.Kill(p.pid, unix.SIGKILL)
	}
	return len(members)
}

// killBelow kills processes of this user whose working directory is below dir.
func killBelow(dir string) error {
	f := family{dir: dir, seen: map[int]string{}}
	return f.sweep()
}

// wait lets time pass on a thread or in a sweep, which nothing may interrupt.
func wait(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}
