package integration_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Bazel builds on its own machine and shares what it has built by the HTTP cache protocol.
func TestBazelHTTPCache(t *testing.T) {
	b := useBazel(t)
	f := &allInOne{data: dataDir(t), flags: []string{"--action-cache-updates"}}
	f.start(t)
	base := "http://" + f.up.field(t, "http")
	for name, url := range map[string]string{"no instance": base, "instance with a slash": base + "/team/a"} {
		t.Run(name, func(t *testing.T) {
			b.clean(t)
			first := b.buildWithCache(t, url)
			if n := first.counts[fromCache]; n > 0 {
				t.Errorf("%d actions of a first build came from the cache", n)
			}
			checkFewOutputs(t, b)
			b.clean(t)
			second := b.buildWithCache(t, url)
			if second.counts[fromCache] == 0 || second.counts["local"] > 0 {
				t.Errorf("%v: want every action from the cache\n%s", second, second.output)
			}
			for _, s := range second.spawns {
				if !s.RemoteCacheHit {
					t.Errorf("%s: runner %q, want a cache hit", s.What, s.Runner)
				}
			}
			checkFewOutputs(t, b)
		})
	}
}

// A farm that lets only workers write its action cache is a cache to read, and says why.
func TestBazelHTTPCacheIsReadOnlyByDefault(t *testing.T) {
	b := useBazel(t)
	f := startUp(t)
	url := "http://" + f.up.field(t, "http")
	for range 2 {
		b.clean(t)
		inv := b.buildWithCache(t, url)
		if inv.counts["local"] == 0 || inv.counts[fromCache] > 0 {
			t.Errorf("%v: want every action to run\n%s", inv, inv.output)
		}
	}
}

func checkFewOutputs(t *testing.T, b *bazel) {
	t.Helper()
	for name, want := range map[string]string{"gen/count.txt": "4\n", "gen/empty": "", "gen/dir.d/deep/er/file49.txt": "file 49\n"} {
		if got := b.output(t, name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if got := len(b.output(t, "gen/large.bin")); got != 9000001 {
		t.Errorf("gen/large.bin has %d bytes, want 9000001", got)
	}
}

// buildWithCache builds on this machine with a cache.
func (b *bazel) buildWithCache(t *testing.T, cache string) *invocation {
	t.Helper()
	executionLog := filepath.Join(scratch, "execution.json")
	if err := os.Remove(executionLog); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	inv, err := b.try(t.Context(), "build", "--remote_cache="+cache, "--spawn_strategy=local",
		"--execution_log_json_file="+executionLog, "//app", "//gen:all", "//tree:all")
	if err != nil {
		t.Fatal(err)
	}
	inv.counts = processSummary(inv.output)
	if inv.exitCode != success {
		t.Fatalf("%v\n%s", inv, inv.output)
	}
	if inv.spawns, err = readSpawns(executionLog); err != nil {
		t.Fatal(err)
	}
	t.Log(inv)
	return inv
}
