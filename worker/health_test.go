package worker_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker"
)

// one is a worker with one slot.
func one(c *worker.Config) { c.Concurrency = 1 }

// trouble is what a worker says that is wrong with it, or "gone".
func (f *farm) trouble(r *running) string {
	for _, w := range f.client.Workers() {
		if w.Name == "worker-"+filepath.Base(r.dir) {
			return w.Trouble
		}
	}
	return "gone"
}

// within is until for what takes several pauses of a worker.
func within(t testing.TB, what string, bound time.Duration, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(bound)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen within %v", what, bound)
		}
		until(t, "a moment", func() bool { return true })
		<-time.After(10 * time.Millisecond) //nolint:forbidigo // polls
	}
}

// breakWorkspaces makes the next workspaces of a worker fail, and returns what mends that.
func breakWorkspaces(t testing.TB, r *running) (mend func()) {
	t.Helper()
	run := filepath.Join(r.dir, "actions", "run")
	for n := range 1000 {
		if err := os.WriteFile(filepath.Join(run, strconv.Itoa(n)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := errors.Join(os.RemoveAll(run), os.Mkdir(run, 0o711), os.Chmod(run, 0o711)); err != nil {
			t.Error(err)
		}
	}
}

// A worker on which nothing works takes itself out after a few jobs, which others finish, says why, and
// comes back when it works again.
func TestWorkerThatFailsLeavesAndComesBack(t *testing.T) {
	f := newFarm(t)
	bad := f.worker("auto", one)
	mend := breakWorkspaces(t, bad)
	good := f.worker("auto", one)
	until(t, "both workers are known", func() bool { return len(f.client.Workers()) == 2 })
	var names []string
	for n := 0; f.trouble(bad) == ""; n++ {
		if n == 60 {
			t.Fatal("the worker never leaves")
		}
		names = append(names, f.submit(broker.Request{Action: f.store(sh("sleep 0.3; echo " + strconv.Itoa(n)))}))
		r := f.wait(names[n])
		if statusCode(r) != code.Code_OK || r.GetResult().GetExitCode() != 0 {
			t.Fatalf("the response is %v", r)
		}
	}
	failures := 0
	for _, name := range names {
		op, err := f.client.Get(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		failures += len(op.Failures)
	}
	if failures > 3 {
		t.Errorf("%d attempts failed before the worker left, want 3 at most", failures)
	}
	if why := f.trouble(bad); !strings.Contains(why, "can't set up actions") {
		t.Errorf("the worker says %q", why)
	}
	mend()
	within(t, "the return of the worker", 30*time.Second, func() bool { return f.trouble(bad) == "" })
	good.stop()
	r := f.run(sh("echo back"))
	if statusCode(r) != code.Code_OK || r.GetResult().GetExecutionMetadata().GetWorker() != "worker-"+filepath.Base(bad.dir) {
		t.Errorf("the response is %v", r)
	}
}

// smallDisk mounts a small file system, where the test's user may.
func smallDisk(t testing.TB, size string) string {
	t.Helper()
	dir := openDir(t)
	if os.Geteuid() != 0 || !mayMount() {
		return ""
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=711,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A worker with a full disk does not eat the queue: what it could not write runs elsewhere, and it is out
// until there is room. An operator who drains it meanwhile is obeyed.
func TestFullDiskIsNoFailureOfTheAction(t *testing.T) {
	dir := smallDisk(t, "64m")
	if dir == "" {
		return // nobody but root can have a small disk
	}
	f := newFarm(t)
	bad := f.workerIn(dir, "auto", one)
	f.ok(sh("true"))
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 63<<20+512<<10), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	name := f.submit(broker.Request{Action: f.store(sh("dd if=/dev/zero of=out bs=1M count=4").outputs("out"))})
	until(t, "the worker is out", func() bool { return strings.Contains(f.trouble(bad), "the disk is full") })
	f.worker("auto", one)
	r := f.wait(name)
	if statusCode(r) != code.Code_OK || r.GetResult().GetExitCode() != 0 {
		t.Errorf("the response is %v", r)
	}
	if info, err := f.client.DrainWorker(t.Context(), "worker-"+filepath.Base(dir), true); err != nil || !info.Draining || info.Trouble == "" {
		t.Errorf("after a drain the worker is %+v, %v", info, err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	within(t, "the end of the trouble", 30*time.Second, func() bool { return f.trouble(bad) == "" })
	for _, w := range f.client.Workers() {
		if drained := w.Name == "worker-"+filepath.Base(dir); w.Draining != drained {
			t.Errorf("%s: draining is %t", w.Name, w.Draining)
		}
	}
	for n := range 5 {
		r := f.run(sh("echo " + strconv.Itoa(n)))
		if r.GetResult().GetExecutionMetadata().GetWorker() == "worker-"+filepath.Base(dir) {
			t.Error("the drained worker took an action")
		}
	}
}

// What fails because the storage does not answer is neither the client's nor the worker's trouble.
func TestStorageTroubleIsNotTheClients(t *testing.T) {
	f := newFarm(t)
	w := f.worker("auto", func(c *worker.Config) { c.FetchTimeout = 100 * time.Millisecond })
	d := f.store(sh("true"))
	f.stallReads()
	r := f.wait(f.submit(broker.Request{Action: d}))
	if statusCode(r) != code.Code_UNAVAILABLE || strings.Count(r.GetStatus().GetMessage(), "fetching the inputs took too long") != broker.MaxAttempts {
		t.Errorf("status is %v", r.GetStatus())
	}
	if why := f.trouble(w); why != "" {
		t.Errorf("the worker is out: %s", why)
	}
}

// A storage that does not answer for a while uses up no attempts: it hits whatever runs, again and again.
func TestOutageOfTheStorageIsNoFailure(t *testing.T) {
	f := newFarm(t)
	d := f.store(sh("echo made"))
	var asked atomic.Int32
	f.blobs.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
		if op != castest.OpOpen || asked.Add(1) > broker.MaxAttempts {
			return castest.Fault{}
		}
		return castest.Fault{After: -1, Err: fmt.Errorf("%w: no leader", cas.ErrUnavailable)}
	}
	f.worker("auto", one)
	name := f.submit(broker.Request{Action: d})
	if r := f.wait(name); statusCode(r) != code.Code_OK {
		t.Errorf("the response is %v", r)
	}
	op, err := f.client.Get(t.Context(), name)
	if err != nil || len(op.Failures) != 0 || op.Attempt != broker.MaxAttempts+1 {
		t.Errorf("the operation is %+v, %v; want no failure in %d attempts", op, err, broker.MaxAttempts+1)
	}
}
