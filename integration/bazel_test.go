package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	installBazel = "install it with `make packages`, or as root: apt-get install -y --no-install-recommends " +
		"bazel-bootstrap bazel-rules-java bazel-rules-proto bazel-platforms bazel-skylib default-jdk-headless gcc g++"
	// bazelWithin bounds one Bazel command. The longest one takes about 15 s on two idle cores.
	bazelWithin = 3 * time.Minute
	// treeFiles is how many source files the rules of //tree see.
	treeFiles = 1000
)

// A bazel is a Bazel server with one workspace, a copy of testdata/workspace. Starting a server is
// what takes the time and the memory, so all tests share one, one after another.
type bazel struct {
	workspace  string
	outputRoot string
	within     time.Duration // bounds one command
}

// useBazel returns the shared Bazel with an empty output tree: whatever is built next comes from the farm.
func useBazel(t *testing.T) *bazel {
	t.Helper()
	b, err := sharedBazel()
	if err != nil {
		t.Fatal(err)
	}
	b.clean(t)
	return b
}

var sharedBazel = sync.OnceValues(func() (*bazel, error) {
	if _, err := exec.LookPath("bazel"); err != nil {
		return nil, fmt.Errorf("these tests need Bazel: %w; %s", err, installBazel)
	}
	b := &bazel{workspace: filepath.Join(scratch, "workspace"), outputRoot: filepath.Join(scratch, "bazel"), within: bazelWithin}
	if err := os.CopyFS(b.workspace, os.DirFS("testdata/workspace")); err != nil {
		return nil, err
	}
	for i := range treeFiles {
		dir := filepath.Join(b.workspace, "tree", "files", strconv.Itoa(i/100), strconv.Itoa(i/10))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		line := fmt.Sprintf("line of file %d\n", i)
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), []byte(line), 0o644); err != nil {
			return nil, err
		}
	}
	return b, b.writeRC()
})

// writeRC tells Bazel where the rules are that it would download, and to run nothing by itself.
func (b *bazel) writeRC() error {
	stubs, err := filepath.Abs("testdata/bazel-offline")
	if err != nil {
		return err
	}
	const rules = "/usr/share/bazel"
	lines := []string{
		"startup --host_jvm_args=-Xmx1500m --max_idle_secs=120",
		"startup --host_jvm_args=-Djava.io.tmpdir=" + scratch, // it leaves files behind
	}
	for _, repository := range [][2]string{
		{"rules_cc", stubs + "/rules_cc"},
		{"rules_java", rules + "/rules/java"},
		{"rules_proto", rules + "/rules/proto"},
		{"platforms", rules + "/tools/platforms"},
		{"bazel_skylib", rules + "/tools/skylib"},
		{"remote_coverage_tools", stubs + "/remote_coverage_tools"},
		{"remote_java_tools_linux", stubs + "/remote_java_tools_linux"},
	} {
		lines = append(lines, "common --override_repository="+repository[0]+"="+repository[1])
	}
	lines = append(
		lines,
		"common --color=no --curses=no --noshow_progress",
		"build --javabase=@local_jdk//:jdk --host_javabase=@local_jdk//:jdk",
		"build --incompatible_strict_action_env --verbose_failures --nosandbox_debug",
		"build --spawn_strategy=remote --noremote_local_fallback --remote_retries=20 --remote_timeout=60",
		"test --test_output=errors --notest_verbose_timeout_warnings",
	)
	return os.WriteFile(filepath.Join(b.workspace, ".bazelrc"), []byte(strings.Join(lines, "\n")+"\n"), 0o644)
}

// A spawn is one action that Bazel had executed or found in a cache, as its execution log tells.
type spawn struct {
	What           string `json:"progressMessage"` // such as "Compiling lib/greet.cc"
	Runner         string `json:"runner"`
	RemoteCacheHit bool   `json:"remoteCacheHit"`
}

// An invocation is what came of one Bazel command.
type invocation struct {
	command  string
	took     time.Duration
	exitCode int
	output   string         // both streams
	counts   map[string]int // the process summary, such as {"remote": 34, "internal": 20}
	spawns   []spawn
}

func (inv *invocation) String() string {
	return fmt.Sprintf("bazel %s: exit code %d, %v, after %.1f s", inv.command, inv.exitCode, inv.counts, inv.took.Seconds())
}

// build runs a command such as build or test on the farm at the endpoint.
func (b *bazel) build(t *testing.T, endpoint, command string, args ...string) *invocation {
	t.Helper()
	return b.background(t, endpoint, command, args...).wait(t)
}

// A pending build runs while the test does something else.
type pending struct {
	done chan struct{} // closed when inv and err are set
	inv  *invocation
	err  error
}

// background starts what build does. The test ends after the build.
func (b *bazel) background(t *testing.T, endpoint, command string, args ...string) *pending {
	t.Helper()
	executionLog := filepath.Join(scratch, "execution.json")
	if err := os.Remove(executionLog); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	args = append([]string{
		command, "--remote_executor=grpc://" + endpoint, "--execution_log_json_file=" + executionLog,
	}, args...)
	p := &pending{done: make(chan struct{})}
	ctx := t.Context()
	go func() {
		defer close(p.done)
		if p.inv, p.err = b.try(ctx, args...); p.err != nil {
			return
		}
		p.inv.counts = processSummary(p.inv.output)
		p.inv.spawns, p.err = readSpawns(executionLog)
	}()
	t.Cleanup(func() { <-p.done })
	return p
}

func (p *pending) wait(t *testing.T) *invocation {
	t.Helper()
	<-p.done
	if p.err != nil {
		t.Fatal(p.err)
	}
	t.Log(p.inv)
	return p.inv
}

// try runs any Bazel command. An exit code other than 0 is no error.
func (b *bazel) try(ctx context.Context, args ...string) (*invocation, error) {
	ctx, cancel := context.WithTimeout(ctx, b.within)
	defer cancel()
	began := time.Now()
	out, err := b.command(ctx, args...).CombinedOutput()
	inv := &invocation{command: strings.Join(args, " "), output: string(out), took: time.Since(began)}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() && ctx.Err() == nil {
		inv.exitCode = exit.ExitCode()
	} else if err != nil {
		return nil, fmt.Errorf("bazel %s: %w\n%s", inv.command, err, out)
	}
	return inv, nil
}

func (b *bazel) command(ctx context.Context, args ...string) *exec.Cmd {
	startup := []string{"--nohome_rc", "--output_user_root=" + b.outputRoot}
	cmd := exec.CommandContext(ctx, "bazel", append(startup, args...)...)
	cmd.Dir = b.workspace
	// An interrupt lets the client cancel its build in the server.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// clean forgets everything that was built; Bazel knows nothing of the farm's cache after it.
func (b *bazel) clean(t *testing.T) {
	t.Helper()
	inv, err := b.try(t.Context(), "clean")
	if err != nil {
		t.Fatal(err)
	}
	if inv.exitCode != 0 {
		t.Fatalf("bazel clean: exit code %d\n%s", inv.exitCode, inv.output)
	}
}

// output reads a file that was built.
func (b *bazel) output(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(b.workspace, "bazel-bin", name))
	if err != nil {
		t.Error(err)
	}
	return string(content)
}

// edit replaces text in a source file until the test ends.
func (b *bazel) edit(t *testing.T, name, from, to string) {
	t.Helper()
	path := filepath.Join(b.workspace, name)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	after := strings.ReplaceAll(string(before), from, to)
	if after == string(before) {
		t.Fatalf("%s has no %q", name, from)
	}
	if err := os.WriteFile(path, []byte(after), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, before, 0o644); err != nil {
			t.Error(err)
		}
	})
}

// shutdownBazel ends the shared server if a test has started it.
func shutdownBazel() {
	if _, err := os.Stat(filepath.Join(scratch, "bazel")); err != nil {
		return
	}
	b, err := sharedBazel()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if out, err := b.command(ctx, "shutdown").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "bazel shutdown: %v\n%s", err, out)
	}
}

var (
	summaryLine  = regexp.MustCompile(`(?m)^INFO: \d+ process(?:es)?: (.*)\.$`)
	summaryCount = regexp.MustCompile(`(\d+) ([a-z -]+)`)
)

// processSummary parses the line "INFO: 54 processes: 20 internal, 34 remote." of Bazel's output.
func processSummary(output string) map[string]int {
	counts := map[string]int{}
	match := summaryLine.FindStringSubmatch(output)
	if match == nil {
		return counts
	}
	for _, part := range summaryCount.FindAllStringSubmatch(match[1], -1) {
		counts[part[2]], _ = strconv.Atoi(part[1]) //nolint:errcheck // the expression lets only digits through
	}
	return counts
}

func readSpawns(path string) ([]spawn, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // Bazel gave up before it had anything to execute
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var spawns []spawn
	for decoder := json.NewDecoder(f); ; {
		var s spawn
		if err := decoder.Decode(&s); errors.Is(err, io.EOF) {
			return spawns, nil
		} else if err != nil {
			return nil, fmt.Errorf("execution log: %w", err)
		}
		spawns = append(spawns, s)
	}
}
