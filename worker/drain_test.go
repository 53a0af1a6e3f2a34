package worker_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/worker"
)

// until waits for a condition that another process brings about.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s did not happen in time", what)
		}
	}
}

func TestDrainFinishesWhatRuns(t *testing.T) {
	f := newFarm(t)
	w := f.worker("auto", nil)
	m := sleepMarker()
	name := f.submit(broker.Request{Action: f.store(sh("sh -c 'sleep 0.7' " + m + "; echo done"))})
	f.executing(name)
	until(t, "the start of the command", func() bool { return marked(t, m) > 0 })
	w.stop()
	r := f.wait(name)
	if statusCode(r) != code.Code_OK || f.blob(r.GetResult().GetStdoutDigest()) != "done\n" {
		t.Errorf("response is %v", r)
	}
	if n := r.GetResult().GetExecutionMetadata().GetWorker(); n != "worker-"+filepath.Base(w.dir) {
		t.Errorf("worker is %s", n)
	}
}

func TestDrainReturnsWhatDoesNotFinish(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		first := f.worker(isolation, func(c *worker.Config) { c.DrainTimeout = 100 * time.Millisecond })
		m := fmt.Sprintf("2.%d", time.Now().UnixNano())
		name := f.submit(broker.Request{Action: f.store(sh("sleep " + m + "; echo done"))})
		until(t, "the start of the command", func() bool { return marked(t, m) > 0 })
		begun := time.Now()
		first.stop()
		if took := time.Since(begun); took > 3*time.Second {
			t.Errorf("the drain took %v", took)
		}
		if n := marked(t, m); n != 0 {
			t.Errorf("%d processes are left", n)
		}
		op, err := f.client.Get(t.Context(), name)
		if err != nil || op.Done() || op.Stage != repb.ExecutionStage_QUEUED {
			t.Errorf("operation is %+v, %v", op, err)
		}
		second := f.worker(isolation, nil)
		r := f.wait(name)
		if statusCode(r) != code.Code_OK || r.GetResult().GetExecutionMetadata().GetWorker() != "worker-"+filepath.Base(second.dir) {
			t.Errorf("response is %v", r)
		}
	})
}

func TestCancelKillsTheAction(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		f.worker(isolation, nil)
		m := sleepMarker()
		d := f.store(sh("trap '' TERM; sleep " + m + " & sleep " + m))
		name := f.submit(broker.Request{Action: d})
		until(t, "the start of the command", func() bool { return marked(t, m) > 0 })
		begun := time.Now()
		if err := f.client.Cancel(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		until(t, "the end of the command", func() bool { return marked(t, m) == 0 })
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("it took %v", took)
		}
		if r := f.wait(name); statusCode(r) != code.Code_CANCELLED {
			t.Errorf("status is %v", r.GetStatus())
		}
		if _, err := f.cache.Get(t.Context(), d); err == nil {
			t.Error("a cancelled action is cached")
		}
		// The worker is free again.
		if code := f.ok(sh("true")).GetExitCode(); code != 0 {
			t.Errorf("the next action has exit code %d", code)
		}
	})
}

func TestNewWipesWhatADeadWorkerLeft(t *testing.T) {
	f := newFarm(t)
	dir := openDir(t)
	left := filepath.Join(dir, "actions", "run", "7", "root", "deep")
	if err := os.MkdirAll(left, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(left, 0); err != nil {
		t.Fatal(err)
	}
	w := f.workerIn(dir, "auto", nil)
	f.ok(sh("true"))
	w.stop()
	for _, d := range []string{"run", "trash"} {
		entries, err := os.ReadDir(filepath.Join(dir, "actions", d))
		if err != nil || len(entries) != 0 {
			t.Errorf("%s has %v left (%v)", d, entries, err)
		}
	}
}

func TestTwoWorkersCannotShareADirectory(t *testing.T) {
	f := newFarm(t)
	w := f.worker("auto", nil)
	_, err := worker.New(worker.Config{Name: "other", Dir: filepath.Join(w.dir, "actions"), Disk: w.tier, Log: f.log})
	if err == nil {
		t.Error("a second worker took the directory")
	}
}

func TestDeepOutputsAreRefusedAndDeleted(t *testing.T) {
	f := newFarm(t)
	w := f.worker("auto", nil)
	a := sh(`p=$(printf 'd/%.0s' $(seq 1500)); mkdir -p out/$p && cd out/$p && mkdir -p $p`).outputs("out")
	r := f.run(a)
	if statusCode(r) != code.Code_FAILED_PRECONDITION {
		t.Errorf("status is %v", r.GetStatus())
	}
	w.stop()
	entries, err := os.ReadDir(filepath.Join(w.dir, "actions", "trash"))
	if err != nil || len(entries) != 0 {
		t.Errorf("trash has %v left (%v)", entries, err)
	}
}
