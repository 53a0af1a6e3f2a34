package integration_test

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Bazel's exit codes.
const (
	success     = 0
	buildFailed = 1
	testsFailed = 3
)

// The ways in which an action of an invocation came to its result, as the process summary calls them.
const (
	ranRemotely = "remote"
	fromCache   = "remote cache hit"
	byBazel     = "internal" // no process at all: links to outputs, files with fixed content
)

func TestBuildOnOneProcess(t *testing.T) {
	testBuilds(t, startUp(t))
}

func TestBuildOnSeparateRoles(t *testing.T) {
	testBuilds(t, startSplit(t, 1, 2))
}

// A crash loses nothing that a build was told: what is in the cache stays there.
func TestCacheSurvivesACrash(t *testing.T) {
	b := useBazel(t)
	f := startUp(t)
	f.crash = true
	first := b.build(t, f.endpoint(t), "build", "//app", "//gen:all", "//tree:all")
	checkAll(t, first, ranRemotely)
	f.restart(t)
	b.clean(t)
	checkAll(t, b.build(t, f.endpoint(t), "build", "//app", "//gen:all", "//tree:all"), fromCache)
}

// testBuilds is a user's day with a fresh farm. Each step needs what the one before has left.
func testBuilds(t *testing.T, f farm) {
	t.Helper()
	b := useBazel(t)
	var built int
	done := t.Run("every action of a first build runs on the farm", func(t *testing.T) {
		inv := b.build(t, f.endpoint(t), "test", "//...")
		checkAll(t, inv, ranRemotely)
		checkOutputs(t, b)
		built = inv.counts[ranRemotely]
	}) && t.Run("a build from scratch comes from the cache", func(t *testing.T) {
		b.clean(t)
		inv := b.build(t, f.endpoint(t), "test", "//...")
		checkAll(t, inv, fromCache)
		checkOutputs(t, b)
		if got := inv.counts[fromCache]; got != built {
			t.Errorf("%d actions came from the cache, want the %d that ran before", got, built)
		}
	}) && t.Run("a changed source rebuilds what depends on it", func(t *testing.T) {
		b.edit(t, "lib/greet.cc", "Hello", "Good morning")
		checkRebuilt(t, b.build(t, f.endpoint(t), "test", "//..."))
		if got, want := b.output(t, "app/greeting.txt"), "Good morning, farm!\n"; got != want {
			t.Errorf("app/greeting.txt = %q, want %q", got, want)
		}
	}) && t.Run("a failing test shows its log", func(t *testing.T) {
		inv := b.build(t, f.endpoint(t), "test", "//tests:fails")
		checkFailed(t, inv, testsFailed, "FAIL: //tests:fails",
			"standard output of the failing test", "standard error of the failing test")
	}) && t.Run("a failing action shows its exit code and standard error", func(t *testing.T) {
		inv := b.build(t, f.endpoint(t), "build", "//tests:exit_code")
		checkFailed(t, inv, buildFailed, "(Exit 42)", "standard error of the broken action")
	}) && t.Run("a test that runs too long times out and shows its log", func(t *testing.T) {
		inv := b.build(t, f.endpoint(t), "test", "//tests:hangs", "--test_timeout=2")
		checkFailed(t, inv, testsFailed, "TIMEOUT: //tests:hangs", "output before the hang")
		if left := sleepers(t, testHangs); len(left) > 0 {
			t.Errorf("processes %v of the timed out test still run", left)
		}
	}) && t.Run("a restart of the farm keeps the cache", func(t *testing.T) {
		f.restart(t)
		b.clean(t)
		inv := b.build(t, f.endpoint(t), "test", "//...")
		checkAll(t, inv, fromCache)
		checkOutputs(t, b)
	})
	if !done {
		t.Log("the steps after a failed one are left out: they would say nothing")
	}
}

// checkAll fails the test unless the invocation succeeded and all its actions had their result in
// the one way.
func checkAll(t *testing.T, inv *invocation, way string) {
	t.Helper()
	if inv.exitCode != success {
		t.Fatalf("%v\n%s", inv, inv.output)
	}
	if inv.counts[way] == 0 {
		t.Errorf("%v: no action was %q\n%s", inv, way, inv.output)
	}
	for other, n := range inv.counts {
		if other != way && other != byBazel {
			t.Errorf("%d actions were %q, want all %q", n, other, way)
		}
	}
	if len(inv.spawns) < inv.counts[way] {
		t.Errorf("the execution log has %d actions, the summary says %d", len(inv.spawns), inv.counts[way])
	}
	for _, s := range inv.spawns {
		if s.RemoteCacheHit != (way == fromCache) || !strings.HasPrefix(s.Runner, "remote") {
			t.Errorf("%s: runner %q, cache hit %v, want %s", s.What, s.Runner, s.RemoteCacheHit, way)
		}
	}
}

// checkRebuilt fails the test unless exactly the actions that depend on lib/greet.cc ran again.
func checkRebuilt(t *testing.T, inv *invocation) {
	t.Helper()
	if inv.exitCode != success {
		t.Fatalf("%v\n%s", inv, inv.output)
	}
	var got []string
	for _, s := range inv.spawns {
		got = append(got, s.What)
		// A test is two actions. The second makes its test.xml of the log and the duration in seconds,
		// which may well be what they were before.
		if s.Runner != "remote" && !strings.HasPrefix(s.What, "Testing ") {
			t.Errorf("%s: runner %q, want remote", s.What, s.Runner)
		}
	}
	slices.Sort(got)
	want := []string{
		"Compiling lib/greet.cc",
		"Compiling lib/greet.cc [for host]",
		"Executing genrule //app:greeting",
		"Linking app/app",
		"Linking app/app [for host]",
		"Linking app/greet_test",
		"Linking lib/libgreet.a",
		"Linking lib/libgreet.so",
		"Testing //app:greet_test",
	}
	if diff := cmp.Diff(want, slices.Compact(got)); diff != "" {
		t.Errorf("actions after a change of lib/greet.cc (-want +got):\n%s", diff)
	}
}

// checkOutputs compares what Bazel has downloaded with what the actions have written.
func checkOutputs(t *testing.T, b *bazel) {
	t.Helper()
	want := map[string]string{
		"app/greeting.txt":             "Hello, farm!\n",
		"gen/sorted.txt":               "ack\nconsumer\nstream\nsubject\n",
		"gen/count.txt":                "4\n",
		"gen/empty":                    "",
		"gen/binary":                   "\x00\xff\n\x00",
		"gen/from_tool.txt":            "from a tool\n",
		"gen/large_size.txt":           "9000001\n",
		"gen/through_link.txt":         "ack\nconsumer\nstream\nsubject\n",
		"gen/linked.txt":               "ack\nconsumer\nstream\nsubject\n",
		"gen/dir.d/deep/er/file49.txt": "file 49\n",
		"gen/dir.d/link.txt":           "file 0\n",
		"tree/lines.txt":               strconv.Itoa(treeFiles) + "\n",
		"gen/dir_listing.txt":          dirListing(),
	}
	for name, content := range want {
		if got := b.output(t, name); got != content {
			t.Errorf("%s = %q, want %q", name, got, content)
		}
	}
	if got := len(b.output(t, "gen/large.bin")); got != 9000001 {
		t.Errorf("gen/large.bin has %d bytes, want 9000001", got)
	}
	if info, err := os.Stat(filepath.Join(b.workspace, "bazel-bin/gen/dir.d/run.sh")); err != nil || info.Mode()&0o100 == 0 {
		t.Errorf("an executable file in an output directory: %v, %v", info, err)
	}
	link := filepath.Join(b.workspace, "bazel-bin/gen/dir.d/link.txt")
	if target, err := os.Readlink(link); err != nil || target != "deep/er/file0.txt" {
		t.Errorf("a symlink in an output directory leads to %q, %v, want deep/er/file0.txt", target, err)
	}
}

// dirListing is what `find . | sort` says in the output directory //gen:dir when it is an input. The
// empty folder in it is missing: this Bazel neither downloads nor sends empty ones.
func dirListing() string {
	lines := []string{".", "./deep", "./deep/er", "./link.txt", "./run.sh"}
	for i := range 50 {
		lines = append(lines, "./deep/er/file"+strconv.Itoa(i)+".txt")
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

func checkFailed(t *testing.T, inv *invocation, exitCode int, texts ...string) {
	t.Helper()
	if inv.exitCode != exitCode {
		t.Errorf("exit code %d, want %d", inv.exitCode, exitCode)
	}
	for _, text := range texts {
		if !strings.Contains(inv.output, text) {
			t.Errorf("the output has no %q", text)
		}
	}
	if t.Failed() {
		t.Logf("%v\n%s", inv, inv.output)
	}
}
