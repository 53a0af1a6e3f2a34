package worker

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// oomCounter counts what the kernel has killed for want of memory, on the whole machine: commands have no
// memory limit of their own that could tell.
type oomCounter struct {
	path string // in the format of /proc/vmstat

	mu    sync.Mutex
	at    time.Time // guarded by mu
	count uint64    // guarded by mu; as of at
}

// oomFresh is how old a count before a command may be, so that short ones don't pay for it.
const oomFresh = time.Second

// before returns a count from before now.
func (c *oomCounter) before() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) > oomFresh {
		c.count, c.at = c.read(), time.Now()
	}
	return c.count
}

// read returns the count as it is, or 0 on a machine that does not tell.
func (c *oomCounter) read() uint64 {
	data, err := os.ReadFile(c.path)
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(data) {
		if value, ok := bytes.CutPrefix(line, []byte("oom_kill ")); ok {
			n, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 64)
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}

// exitKilled is the exit code of a command that was killed, and of a shell whose command was.
const exitKilled = 128 + int(unix.SIGKILL)

// killText says what ended a command that did not end by itself, or "" (row D21).
func killText(ended sandbox.Result, outOfMemory bool) string {
	switch {
	case ended.Exceeded != "":
		return "The action exceeded a limit: " + ended.Exceeded + "."
	case ended.ExitCode == exitKilled && outOfMemory:
		return "The action was killed while the worker's machine was out of memory, most likely for what it used itself."
	case ended.Signal == unix.SIGXFSZ:
		return "The action exceeded a limit: a file became larger than its limit (SIGXFSZ)."
	case ended.Signal == unix.SIGXCPU:
		return "The action exceeded a limit: it used more processor time than its limit (SIGXCPU)."
	case ended.Signal != 0:
		return fmt.Sprintf("The action was ended by signal %d (%v).", int(ended.Signal), ended.Signal)
	}
	return ""
}
