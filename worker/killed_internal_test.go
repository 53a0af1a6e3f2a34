package worker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// TestOutOfMemoryIsSaid: a command that was killed while the kernel killed for want of memory says so
// (row D21).
func TestOutOfMemoryIsSaid(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vmstat")
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("pgfault 12\noom_kill 41\nswap_ra 0\n")
	c := &oomCounter{path: path}
	before := c.before()
	write("pgfault 12\noom_kill 42\nswap_ra 0\n")
	if again := c.before(); before != 41 || again != 41 || c.read() != 42 {
		t.Errorf("counts are %d, %d and %d, want 41, 41 and 42", before, again, c.read())
	}
	c.at = time.Now().Add(-2 * oomFresh)
	if again := c.before(); again != 42 {
		t.Errorf("an old count was kept: %d", again)
	}
	for _, text := range []string{"", "oom_kill many\n", "oom_kill_x 3\n"} {
		if write(text); c.read() != 0 {
			t.Errorf("%q is read as %d", text, c.read())
		}
	}
	for _, test := range []struct {
		ended sandbox.Result
		oom   bool
		want  string
	}{
		{sandbox.Result{ExitCode: 137, Signal: unix.SIGKILL}, true, "out of memory"},
		{sandbox.Result{ExitCode: 137}, true, "out of memory"}, // its shell lived on
		{sandbox.Result{ExitCode: 137, Signal: unix.SIGKILL}, false, "signal 9 (killed)"},
		{sandbox.Result{ExitCode: 1}, true, ""},
		{sandbox.Result{}, true, ""},
		{sandbox.Result{ExitCode: 137, Signal: unix.SIGKILL, Exceeded: "standard output"}, false, "exceeded a limit: standard output"},
	} {
		got := killText(test.ended, test.oom)
		if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%+v, out of memory %t: %q, want %q", test.ended, test.oom, got, test.want)
		}
	}
}
