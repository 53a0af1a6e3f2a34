package integration_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// slots is how many actions a farm of these tests runs at once.
const slots = 4

// dataDir returns a folder for one test that is removed with everything below it.
func dataDir(t testing.TB) string {
	t.Helper()
	//nolint:usetesting // the testing package fails to remove folders that may not be written
	dir, err := os.MkdirTemp(scratch, "data-")
	if err == nil {
		err = openToAll(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeAll(dir); err != nil {
			t.Errorf("remove the data of the test: %v", err)
		}
	})
	return dir
}

// A farm is a set of running roles that together execute builds.
type farm interface {
	// endpoint is the address of its gRPC services.
	endpoint(t testing.TB) string
	// restart ends every role and starts it again on the same data.
	restart(t testing.TB)
}

// An allInOne farm is `jetfarm up`: one process.
type allInOne struct {
	data string
	// crash makes restart kill the process instead of stopping it.
	crash bool
	// flags are further ones of the command line.
	flags []string
	up    *process
}

func startUp(t testing.TB) *allInOne {
	t.Helper()
	f := &allInOne{data: dataDir(t)}
	f.start(t)
	return f
}

func (f *allInOne) start(t testing.TB) {
	t.Helper()
	args := []string{
		"up", "--data", f.data, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--concurrency", strconv.Itoa(slots),
	}
	f.up = start(t, "up", append(args, f.flags...)...)
}

func (f *allInOne) endpoint(t testing.TB) string {
	t.Helper()
	return f.up.field(t, "grpc")
}

func (f *allInOne) restart(t testing.TB) {
	t.Helper()
	if f.crash {
		f.up.kill(t)
	} else {
		f.up.stop(t)
	}
	f.start(t)
}

// A splitFarm is a broker, frontends and workers, each a process of its own.
type splitFarm struct {
	data      string
	broker    *process
	frontends []*process
	workers   []*process
}

func startSplit(t testing.TB, frontends, workers int) *splitFarm {
	t.Helper()
	f := &splitFarm{data: dataDir(t), frontends: make([]*process, frontends), workers: make([]*process, workers)}
	f.start(t)
	return f
}

func (f *splitFarm) start(t testing.TB) {
	t.Helper()
	f.broker = start(t, "broker", "broker", "--data", filepath.Join(f.data, "broker"), "--listen", "127.0.0.1:0")
	for i := range f.frontends {
		f.frontends[i] = f.startFrontend(t, "frontend"+strconv.Itoa(i))
	}
	for i := range f.workers {
		f.workers[i] = f.startWorker(t, "worker"+strconv.Itoa(i))
	}
}

func (f *splitFarm) startFrontend(t testing.TB, name string) *process {
	t.Helper()
	return start(t, name, "frontend", "--nats", f.broker.field(t, "nats"),
		"--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
}

// startWorker starts a worker that keeps its files in a folder named after it.
func (f *splitFarm) startWorker(t testing.TB, name string) *process {
	t.Helper()
	return start(t, name, "worker", "--nats", f.broker.field(t, "nats"), "--data", filepath.Join(f.data, name),
		"--http", "127.0.0.1:0", "--concurrency", strconv.Itoa(slots/2), "--platform", "OSFamily=linux")
}

func (f *splitFarm) endpoint(t testing.TB) string {
	t.Helper()
	return f.frontends[0].field(t, "grpc")
}

func (f *splitFarm) restart(t testing.TB) {
	t.Helper()
	for _, p := range append(append([]*process{}, f.workers...), f.frontends...) {
		p.stop(t)
	}
	f.broker.stop(t)
	f.start(t)
}
