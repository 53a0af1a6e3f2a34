package integration_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// ccache keeps its own values in the HTTP cache: what one machine has compiled the next one finds.
func TestCcacheSharesWhatItCompiled(t *testing.T) {
	if _, err := exec.LookPath("ccache"); err != nil {
		t.Fatalf("%v; install it with `make packages`", err)
	}
	up := start(t, "up", "up", "--data", dataDir(t), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
		"--action-cache-updates", "--http-opaque-results", "--concurrency", strconv.Itoa(slots))
	dir := t.TempDir()
	source := filepath.Join(dir, "a.c")
	if err := os.WriteFile(source, []byte("int answer(void) { return 42; }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	compile := func(machine string) (hits string) {
		t.Helper()
		run := func(args ...string) string {
			t.Helper()
			cmd := exec.CommandContext(t.Context(), "ccache", args...)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "CCACHE_DIR="+filepath.Join(dir, machine), "CCACHE_NOHASHDIR=true",
				"CCACHE_REMOTE_STORAGE=http://"+up.field(t, "http")+"|layout=bazel")
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("ccache %v: %v\n%s", args, err, out)
			}
			return string(out)
		}
		run("gcc", "-c", source, "-o", filepath.Join(dir, machine+".o"))
		for line := range strings.Lines(run("--print-stats")) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "\t")
			switch key {
			case "remote_storage_hit":
				hits = value
			case "remote_storage_error":
				if value != "0" {
					t.Errorf("%s: %s errors", machine, value)
				}
			}
		}
		return hits
	}
	if hits := compile("first"); hits != "0" {
		t.Errorf("the first machine had %s hits", hits)
	}
	if hits := compile("second"); hits != "1" {
		t.Errorf("the second machine had %q hits, want 1", hits)
	}
}
