package integration_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/integration/history"
)

// chaos is how much is asked of a farm and for how long each fault lasts.
type chaos struct {
	nodes   int
	clients int
	actions int64 // of the synthetic load, at least
	build   int   // actions of Bazel's build
	lasting time.Duration
}

// Whatever dies, is frozen, is cut off or runs out of disk: builds are green, and every operation ends
// once, for all who wait for it, and leaves nothing. `make chaos` runs the long form.
func TestChaos(t *testing.T) {
	actions := os.Getenv("JETFARM_CHAOS")
	if actions == "" {
		chaos{nodes: 3, clients: 8, actions: 200, build: 60, lasting: 2 * time.Second}.run(t)
		return
	}
	n, err := strconv.Atoi(actions)
	if err != nil || n < 10 {
		t.Fatalf("JETFARM_CHAOS=%q is not a number of actions", actions)
	}
	long := chaos{clients: 64, actions: int64(n), build: n / 10, lasting: 30 * time.Second}
	for _, nodes := range []int{3, 1} {
		t.Run(fmt.Sprint("broker nodes ", nodes), func(t *testing.T) {
			long.nodes = nodes
			long.run(t)
		})
	}
}

// run breaks a farm in every way, one after the other, while a real Bazel and many clients use it.
func (c chaos) run(t *testing.T) {
	began := time.Now()
	phase := func(what string) { t.Logf("%v: %s", time.Since(began).Round(100*time.Millisecond), what) }
	f := startChaosFarm(t, c.nodes)
	phase("the farm serves")
	h := &history.History{}
	spy := startSpy(t, f.nats, h)
	load := &chaosLoad{clients: c.clients, least: c.actions, history: h, runs: runsFile(t)}
	var endpoints []string
	for _, r := range f.frontends {
		endpoints = append(endpoints, r.p.field(t, "grpc"))
	}
	load.endpoints = endpoints

	b := useBazel(t)
	phase("there is a Bazel")
	b.within = time.Hour
	t.Cleanup(func() { b.within = bazelWithin })
	b.writeChaos(t, c.build, load.runs)
	build := b.background(t, startForwarder(t, endpoints...).addr(), "build", "//chaos:all", "--jobs=64")

	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	var clients errgroup.Group
	clients.Go(func() error { return load.run(ctx, t) })
	for _, fault := range f.faults() {
		before := load.ended.Load()
		fault.happen(t, c.lasting)
		mended := time.Now()
		await(t, 5*time.Minute, "end of an action after: "+fault.name, func() bool { return load.ended.Load() >= before+int64(c.clients) })
		phase(fmt.Sprintf("%s, went on after %v, %d actions have ended",
			fault.name, time.Since(mended).Round(100*time.Millisecond), load.ended.Load()))
	}
	load.over.Store(true)
	if err := clients.Wait(); err != nil {
		t.Error(err)
	}
	phase("the clients have ended")
	inv := build.wait(t)
	if inv.exitCode != success {
		t.Errorf("%v\n%s", inv, inv.output)
	}
	for i := range c.build {
		if got, want := b.output(t, fmt.Sprintf("chaos/%d.txt", i)), fmt.Sprintf("%d\n", i); got != want {
			t.Errorf("output %d of the build is %q, want %q", i, got, want)
		}
	}
	spy.awaitEnd(t, f, h, load.runs)
	phase("nothing is left, or should be")
	spy.collect(t, h, dial(t, endpoints[1]), load.runs)
	spy.nc.Close()
	phase("the history is complete")
	f.stop(t)
	phase("the farm is stopped")
	for _, violation := range h.Check() {
		t.Error(violation)
	}
	runs := 0
	for _, n := range h.Runs {
		runs += n
	}
	t.Logf("%d asks, %d operations, %d states seen, %d actions that ran %d times", len(h.Asks), len(h.Records), len(h.States), len(h.Runs), runs)
}

// writeChaos adds a package with independent actions that leave their names in a file when they run.
func (b *bazel) writeChaos(t *testing.T, actions int, runs string) {
	t.Helper()
	dir := filepath.Join(b.workspace, "chaos")
	text := fmt.Sprintf(`[genrule(
    name = "b%%d" %% i,
    outs = ["%%d.txt" %% i],
    cmd = "echo b%%d >> %s; sleep 1; echo %%d > $@" %% (i, i),
) for i in range(%d)]
`, runs, actions)
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "BUILD"), []byte(text), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
}

// runsFile makes a file that every action can append to: not below the temporary files where actions have
// their own.
func runsFile(t *testing.T) string {
	t.Helper()
	base := scratch
	if os.Geteuid() == 0 {
		base = "/var/lib"
	}
	//nolint:usetesting // actions don't see the temporary files of the test
	dir, err := os.MkdirTemp(base, "jetfarm-chaos-")
	if err == nil {
		t.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Error(err)
			}
		})
		err = openToAll(dir)
	}
	path := filepath.Join(dir, "runs")
	if err == nil {
		err = os.WriteFile(path, nil, 0o600)
	}
	if err == nil {
		err = os.Chmod(path, 0o666)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}
