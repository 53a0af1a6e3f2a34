package integration_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// sleepers returns the processes of this machine that are a sleep of that duration, in whatever
// namespaces they are: the running attempts of an action of //slow.
func sleepers(t testing.TB, duration string) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range files {
		// A process may be gone by the time its file is read.
		if line, err := os.ReadFile(file); err == nil && string(line) == "sleep\x00"+duration+"\x00" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// awaitSleeper waits for a sleep of that duration below the process with one of the given ids, and
// returns its process id and whose it is.
func awaitSleeper(t *testing.T, duration string, owners ...*process) (int, *process) {
	t.Helper()
	var pid int
	var owner *process
	await(t, time.Minute, "a running action", func() bool {
		for _, pid = range sleepers(t, duration) {
			for _, owner = range owners {
				if descends(pid, owner.pid()) {
					return true
				}
			}
		}
		return false
	})
	return pid, owner
}

// descends says whether a process is a descendant of another.
func descends(pid, ancestor int) bool {
	for pid > 1 {
		if pid == ancestor {
			return true
		}
		pid = parent(pid)
	}
	return false
}

// parent returns 0 for a process that is gone.
func parent(pid int) int {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0
	}
	// "pid (any name) state parent ..."
	words := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(words) < 2 {
		return 0
	}
	ppid, err := strconv.Atoi(string(words[1]))
	if err != nil {
		return 0
	}
	return ppid
}

// await fails the test unless the condition holds within the bound.
func await(t testing.TB, bound time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(bound)
	defer deadline.Stop()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for !condition() {
		select {
		case <-deadline.C:
			t.Fatalf("no %s within %v", what, bound)
		case <-again.C:
		}
	}
}
