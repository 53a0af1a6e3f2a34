package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// marker is a number of seconds that no other test sleeps.
func marker(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("%d.%d", 70000+os.Getpid()%10000, time.Now().UnixNano())
}

// marked counts the living processes that have marker in their command line.
func marked(t testing.TB, marker string) int {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), marker) {
			n++
		}
	}
	return n
}

var errStop = errors.New("stop")

func TestTimeoutKillsProcessGroup(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		m := marker(t)
		s := r.sh("echo hi; sleep " + m + " & sleep " + m)
		s.Timeout = 200 * time.Millisecond
		begun := time.Now()
		res := r.run(s)
		if !res.TimedOut || res.ExitCode == 0 || res.Duration < s.Timeout {
			t.Errorf("result is %+v, want a timeout", res)
		}
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("a timeout of 200 ms took %v", took)
		}
		if got := output(t, s.Stdout); got != "hi\n" {
			t.Errorf("stdout is %q", got)
		}
		if n := marked(t, m); n != 0 {
			t.Errorf("%d processes are left", n)
		}
	})
}

func TestDaemonIsDeadAndDoesNotDelayTheEnd(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		m := marker(t)
		begun := time.Now()
		// Two forks and a session of its own; it ignores SIGTERM and SIGHUP and holds the output.
		s := r.sh(`(setsid sh -c 'trap "" TERM HUP; echo started > daemon; sleep ` + m + `; true' &) ; while ! test -s daemon; do :; done`)
		if res := r.run(s); res.ExitCode != 0 {
			t.Errorf("%+v, stderr %q", res, output(t, s.Stderr))
		}
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("the run took %v", took)
		}
		if n := marked(t, m); n != 0 {
			t.Errorf("%d processes are left", n)
		}
	})
}

func TestX_121_ForkBombIsDeadAfterTimeout(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		m := marker(t)
		s := r.sh("i=0; while [ $i -lt 100 ]; do (setsid sleep " + m + " &) ; i=$((i+1)); done; sleep " + m)
		s.Timeout = 500 * time.Millisecond
		if res := r.run(s); !res.TimedOut {
			t.Errorf("result is %+v, want a timeout", res)
		}
		if n := marked(t, m); n != 0 {
			t.Errorf("%d processes are left", n)
		}
	})
}

func TestCancelKillsWithinTwoSeconds(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		m := marker(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		timer := time.AfterFunc(100*time.Millisecond, func() { cancel(errStop) })
		defer timer.Stop()
		begun := time.Now()
		_, err := r.slot.Run(ctx, r.sh("trap '' TERM INT; sleep "+m+" & sleep "+m))
		if !errors.Is(err, errStop) {
			t.Errorf("error is %v, want the cause of the cancel", err)
		}
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("it took %v", took)
		}
		if n := marked(t, m); n != 0 {
			t.Errorf("%d processes are left", n)
		}
	})
}

func TestOutputFloodIsKilled(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		s := r.spec("/usr/bin/yes")
		s.MaxOutput = 1 << 20
		res := r.run(s)
		if !strings.Contains(res.Exceeded, "standard output") || res.ExitCode != 137 {
			t.Errorf("result is %+v", res)
		}
	})
}

func TestOpenKillsWhatADeadWorkerLeft(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		uid := r.slot.UID()
		if err := r.pool.Close(); err != nil {
			t.Fatal(err)
		}
		m := marker(t)
		cmd := exec.CommandContext(t.Context(), "/bin/sleep", m)
		cmd.Dir = r.root
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if uid >= 0 {
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		openPool(t, r.pool.Mode(), r.base)
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
			t.Errorf("the left process ended with %v", err)
		}
	})
}
