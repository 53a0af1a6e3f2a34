package integration_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// What actions do to the worker that runs them: each ends in bounded time, what it leaves is no danger, and
// the worker runs the next one.
func TestHostileActions(t *testing.T) {
	t.Setenv("JETFARM_TEST_SECRET", "secret of the worker")
	inherited, err := os.Create(filepath.Join(dataDir(t), "left-open"))
	if err != nil {
		t.Fatal(err)
	}
	defer inherited.Close()
	leaks, err := unix.Dup(int(inherited.Fd())) // unlike that of Go it goes to the processes of the test
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leaks)
	c := dial(t, startUp(t).endpoint(t))
	marker := fmt.Sprintf("%d.5", 200_000+os.Getpid())
	for row, test := range map[string]struct{ script, text string }{
		"X-129 a named pipe":                {"echo said; mkfifo out", `"out" is a named pipe`},
		"X-129 a named pipe in a directory": {"echo said; mkdir out; mkfifo out/pipe", `"out/pipe" is a named pipe`},
		"X-128 ten terabytes of nothing":    {"echo said; truncate -s 10T out", "output limit"},
		"X-136 a name that is not UTF-8":    {"echo said; mkdir out; touch out/$(printf '\\377')", "not UTF-8"},
		"X-137 directories very deep":       {"echo said; p=$(printf 'd/%.0s' $(seq 1500)); mkdir -p out/$p && cd out/$p && mkdir -p $p", "out"},
	} {
		t.Run(row, func(t *testing.T) {
			response := c.run(t, script(test.script, "out"))
			wantRefused(t, response, codes.FailedPrecondition, test.text)
			if got := c.text(t, response.GetResult().GetStdoutDigest()); got != "said\n" {
				t.Errorf("standard output %q", got)
			}
		})
	}
	t.Run("X-130 outputs that nobody may read", func(t *testing.T) {
		result, _ := c.ok(t, script("echo x > out; chmod 000 out; mkdir dir; echo y > dir/f; chmod 000 dir", "dir", "out"))
		if len(result.GetOutputFiles()) != 1 || len(result.GetOutputDirectories()) != 1 ||
			result.GetOutputFiles()[0].GetIsExecutable() || c.text(t, result.GetOutputFiles()[0].GetDigest()) != "x\n" {
			t.Errorf("result %v", result)
		}
	})
	t.Run("X-131 X-132 hard links and bits", func(t *testing.T) {
		j := script("echo x > a; ln a b; ln in c || cp in c; chmod 6755 a", "a", "b", "c")
		j.files = map[string]string{"in": "input\n"}
		result, _ := c.ok(t, j)
		got := map[string]string{}
		for _, f := range result.GetOutputFiles() {
			got[f.GetPath()] = fmt.Sprint(c.text(t, f.GetDigest()), f.GetIsExecutable())
		}
		if got["a"] != "x\ntrue" || got["b"] != "x\ntrue" || !strings.HasPrefix(got["c"], "input\n") {
			t.Errorf("outputs %q", got)
		}
		j = script("stat -c %A a", "")
		j.files = map[string]string{"a": "x\n"}
		if _, mode := c.ok(t, j); strings.ContainsAny(mode, "sS") {
			t.Errorf("the next action gets the file as %s", mode)
		}
	})
	t.Run("X-86 X-134 a parent that becomes a symlink", func(t *testing.T) {
		response := c.run(t, script("rm -rf d; ln -s /etc d; ln -s /etc/passwd p", "d/passwd", "p"))
		result := response.GetResult()
		for _, f := range result.GetOutputFiles() {
			t.Errorf("the result has the file %v", f)
		}
		if links := result.GetOutputSymlinks(); response.GetStatus().GetCode() == 0 && (len(links) != 1 || links[0].GetTarget() != "/etc/passwd") {
			t.Errorf("symlinks %v", links)
		}
	})
	t.Run("X-135 symlinks to anywhere", func(t *testing.T) {
		want := []string{"/etc/passwd", "../../..", "nowhere", "loop"}
		result, _ := c.ok(t, script("ln -s /etc/passwd abs; ln -s ../../.. up; ln -s nowhere dangling; ln -s loop ./loop", "abs", "up", "dangling", "loop"))
		var got []string
		for _, l := range result.GetOutputSymlinks() {
			got = append(got, l.GetTarget())
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) || len(result.GetOutputFiles())+len(result.GetOutputDirectories()) > 0 {
			t.Errorf("targets %q, want %q, in %v", got, want, result)
		}
	})
	t.Run("X-97 outputs twice and nested", func(t *testing.T) {
		result, _ := c.ok(t, script("mkdir d; echo x > d/f", "d/f", "d", "d/f", "d"))
		if len(result.GetOutputFiles()) != 1 || len(result.GetOutputDirectories()) != 1 {
			t.Errorf("result %v", result)
		}
	})
	t.Run("EXV-27 X-98 an input that is an output", func(t *testing.T) {
		j := script("echo more >> both", "both", "same")
		j.files = map[string]string{"both": "some\n", "same": "same\n"}
		result, _ := c.ok(t, j)
		if len(result.GetOutputFiles()) != 2 || c.text(t, result.GetOutputFiles()[0].GetDigest()) != "some\nmore\n" ||
			c.text(t, result.GetOutputFiles()[1].GetDigest()) != "same\n" {
			t.Errorf("result %v", result)
		}
	})
	t.Run("X-123 X-124 a daemon that keeps standard output open", func(t *testing.T) {
		begun := time.Now()
		_, out := c.ok(t, script("setsid sleep "+marker+" & echo done"))
		if took := time.Since(begun); out != "done\n" || took > 30*time.Second {
			t.Errorf("standard output %q after %v", out, took)
		}
		if n := len(sleepers(t, marker)); n > 0 {
			t.Errorf("%d processes are left", n)
		}
	})
	t.Run("X-133 X-144 children that still write", func(t *testing.T) {
		for range 5 {
			j := script("(while :; do echo x >> out; done) & (while :; do echo x > tmp; mv tmp out2; done) & sleep 0.1; exit 0", "out", "out2")
			j.action.DoNotCache = true
			result, _ := c.ok(t, j)
			for _, f := range result.GetOutputFiles() {
				if err := c.read(t.Context(), f.GetDigest(), new(strings.Builder)); err != nil {
					t.Errorf("%s: %v", f.GetPath(), err)
				}
			}
		}
	})
	t.Run("X-125 a flood on standard output", func(t *testing.T) {
		response := c.run(t, script("yes"))
		if response.GetStatus().GetCode() != 0 || response.GetResult().GetExitCode() != 137 || !strings.Contains(response.GetMessage(), "standard output") {
			t.Errorf("response %v", response)
		}
	})
	t.Run("X-139 files that the worker has inherited", func(t *testing.T) {
		if _, out := c.ok(t, script("ls -l /proc/$$/fd | grep left-open; true")); out != "" {
			t.Errorf("the action has %q", out)
		}
	})
	if os.Geteuid() == 0 { // else actions run as the worker's user
		t.Run("X-139 secrets of the worker", func(t *testing.T) {
			_, out := c.ok(t, script("cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep 'secret of the worker'; true"))
			if out != "" {
				t.Errorf("the action finds %q", out)
			}
		})
		t.Run("X-140 signals to others", func(t *testing.T) {
			c.run(t, script("kill -9 $PPID; kill -9 -1"))
		})
		t.Run("X-142 the machine's settings", func(t *testing.T) {
			_, out := c.ok(t, script(`(mount -t tmpfs none /tmp || date -s 2001-01-01 || echo x > /proc/sys/kernel/core_pattern || renice -n -5 $$) >/dev/null 2>&1 && echo changed; true`))
			if out != "" {
				t.Errorf("the action has %q something", out)
			}
		})
	}
	if err := checkRan(c.run(t, script("true"))); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// A cancelled action is killed whatever it does, everybody sees the same end, and nothing is cached.
func TestEXR_18_X_122_CancelledActions(t *testing.T) {
	c := dial(t, startUp(t).endpoint(t))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	marker := fmt.Sprintf("%d.75", 300_000+os.Getpid())
	a := shell(t, "cancelled", "trap '' TERM; sleep "+marker+" & sleep "+marker)
	if err := c.put(ctx, a.blobs...); err != nil {
		t.Fatal(err)
	}
	stream, err := c.runs.Execute(ctx, &repb.ExecuteRequest{ActionDigest: a.digest})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	await(t, 30*time.Second, "start of the command", func() bool { return len(sleepers(t, marker)) > 0 })
	if _, err := longrunningpb.NewOperationsClient(c.conn).CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: first.GetName()}); err != nil {
		t.Fatal(err)
	}
	response, err := result(stream)
	if err != nil || codes.Code(response.GetStatus().GetCode()) != codes.Canceled {
		t.Errorf("Execute = %v, %v, want CANCELLED", response, err)
	}
	await(t, 30*time.Second, "end of the command", func() bool { return len(sleepers(t, marker)) == 0 })
	again, err := c.runs.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: first.GetName()})
	if err != nil {
		t.Fatal(err)
	}
	if response, err := result(again); err != nil || codes.Code(response.GetStatus().GetCode()) != codes.Canceled {
		t.Errorf("WaitExecution = %v, %v, want CANCELLED", response, err)
	}
	if c.cached(t, a.digest) != nil {
		t.Error("a cancelled action is cached")
	}
}
