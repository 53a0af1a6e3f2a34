package integration_test

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Each action that waits sleeps for a duration of its own, by which its processes are found.
const (
	testHangs    = "600.0411"
	workerDies   = "5.0173"
	frontendDies = "5.0291"
	workerStops  = "5.0307"
	leftBehind   = "300.0437"
)

// Another worker runs what the dead one has left, and Bazel does not notice.
func TestEXR_15_BuildSurvivesTheDeathOfAWorker(t *testing.T) {
	b := useBazel(t)
	f := startSplit(t, 1, 2)
	build := b.background(t, f.endpoint(t), "build", "//slow:worker_dies")

	_, owner := awaitSleeper(t, workerDies, f.workers...)
	owner.kill(t)
	killed := time.Now()
	other := f.workers[0]
	if owner == other {
		other = f.workers[1]
	}
	awaitSleeper(t, workerDies, other)
	t.Logf("%s took the action over after %v", other.name, time.Since(killed).Round(time.Millisecond))

	checkAll(t, build.wait(t), ranRemotely)
	if got := b.output(t, "slow/worker_dies.txt"); got != "done\n" {
		t.Errorf("output = %q, want done", got)
	}
}

// A retry finds the operation at another frontend: the action runs once.
func TestWAIT_5_BuildSurvivesTheDeathOfAFrontend(t *testing.T) {
	b := useBazel(t)
	f := startSplit(t, 2, 1)
	balancer := startForwarder(t, f.frontends[0].field(t, "grpc"), f.frontends[1].field(t, "grpc"))
	build := b.background(t, balancer.addr(), "build", "//slow:frontend_dies")

	first, _ := awaitSleeper(t, frontendDies, f.workers...)
	f.frontends[0].kill(t)

	attempts := map[int]bool{first: true}
	await(t, bazelWithin, "end of the build", func() bool {
		for _, pid := range sleepers(t, frontendDies) {
			attempts[pid] = true
		}
		select {
		case <-build.done:
			return true
		default:
			return false
		}
	})
	checkAll(t, build.wait(t), ranRemotely)
	if got := b.output(t, "slow/frontend_dies.txt"); got != "done\n" {
		t.Errorf("output = %q, want done", got)
	}
	if len(attempts) != 1 {
		t.Errorf("the action ran %d times, want once", len(attempts))
	}
}

// A worker that is asked to stop finishes what it has begun.
func TestStoppingWorkerFinishesItsAction(t *testing.T) {
	b := useBazel(t)
	f := startSplit(t, 1, 1)
	build := b.background(t, f.endpoint(t), "build", "//slow:worker_stops")

	awaitSleeper(t, workerStops, f.workers...)
	f.workers[0].stop(t)

	checkAll(t, build.wait(t), ranRemotely)
	if got := b.output(t, "slow/worker_stops.txt"); got != "done\n" {
		t.Errorf("output = %q, want done", got)
	}
}

// A worker that starts where another was killed ends what that one has left running, runs the action
// anew, and kills it when the operation is cancelled.
func TestRestartedWorkerCleansUpAndCancels(t *testing.T) {
	f := startSplit(t, 1, 1)
	c := dial(t, f.endpoint(t))
	a := shell(t, "left behind", "sleep "+leftBehind)
	if err := c.put(t.Context(), a.blobs...); err != nil {
		t.Fatal(err)
	}
	stream, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: a.digest})
	if err != nil {
		t.Fatal(err)
	}
	operation, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}

	left, _ := awaitSleeper(t, leftBehind, f.workers[0])
	f.workers[0].kill(t)
	f.workers[0] = f.startWorker(t, "worker0")
	if f.workers[0].log.contains("isolation=none") {
		// Without users of its own a worker cannot tell what another one has started.
		if err := syscall.Kill(left, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	await(t, 10*time.Second, "end of the process that the killed worker has left", func() bool { return parent(left) == 0 })

	attempt, _ := awaitSleeper(t, leftBehind, f.workers[0])
	operations := longrunningpb.NewOperationsClient(c.conn)
	request := &longrunningpb.CancelOperationRequest{Name: operation.GetName()}
	if _, err := operations.CancelOperation(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	await(t, 5*time.Second, "end of the cancelled action", func() bool { return parent(attempt) == 0 })
	response, err := result(stream)
	if err != nil {
		t.Fatal(err)
	}
	if got := codes.Code(response.GetStatus().GetCode()); got != codes.Canceled {
		t.Errorf("status of the cancelled execution = %v, want CANCELLED", got)
	}
}

// A farm in one process that is asked to stop finishes what runs, and whoever waits for that gets the
// result. What still waits for a worker then is told to come again.
func TestStoppingUpFinishesWhatRuns(t *testing.T) {
	f := startUp(t)
	c := dial(t, f.endpoint(t))
	execute := func(a *action) grpc.ServerStreamingClient[longrunningpb.Operation] {
		t.Helper()
		if err := c.put(t.Context(), a.blobs...); err != nil {
			t.Fatal(err)
		}
		stream, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: a.digest})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		return stream
	}
	var running []grpc.ServerStreamingClient[longrunningpb.Operation]
	for i := range slots {
		stream := execute(shell(t, fmt.Sprint("running ", i), "sleep 3"))
		awaitStage(t, stream, repb.ExecutionStage_EXECUTING)
		running = append(running, stream)
	}
	waiting := execute(shell(t, "waiting", "true"))
	f.up.stop(t)
	finished := 0
	for _, stream := range running {
		response, err := result(stream)
		if err == nil && response.GetResult().GetExitCode() == 0 && response.GetStatus().GetCode() == 0 {
			finished++
		}
	}
	if finished != slots {
		t.Errorf("%d of %d running actions ended with their result", finished, slots)
	}
	if _, err := result(waiting); status.Code(err) != codes.Unavailable {
		t.Errorf("the waiting action ended with %v, want UNAVAILABLE", err)
	}
}

// awaitStage reads a stream until its operation is in a stage.
func awaitStage(t *testing.T, stream grpc.ServerStreamingClient[longrunningpb.Operation], want repb.ExecutionStage_Value) {
	t.Helper()
	for {
		op, err := stream.Recv()
		if err != nil {
			t.Fatalf("waiting for stage %v: %v", want, err)
		}
		metadata := new(repb.ExecuteOperationMetadata)
		if err := op.GetMetadata().UnmarshalTo(metadata); err != nil {
			t.Fatal(err)
		}
		if metadata.GetStage() == want {
			return
		}
	}
}
