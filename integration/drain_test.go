package integration_test

import (
	"strings"
	"syscall"
	"testing"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Each action that waits sleeps for a duration of its own.
const (
	outlivesFrontend = "600.0601"
	endsInTime       = "600.0607"
)

// Rows OPS-6, WAIT-5 and WAIT-8: a frontend that is asked to stop lets the streams that are open go on for its
// drain timeout, and then tells their clients to come again. Nothing is lost: the operation runs on, WaitExecution
// at another frontend follows it, and Execute there joins it.
func TestOPS_6_FrontendStopsWithOpenStreams(t *testing.T) {
	f := startSplit(t, 1, 1)
	args := []string{"frontend", "--nats", f.broker.field(t, "nats"), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--drain-timeout"}
	c := dial(t, f.endpoint(t))

	hasty := start(t, "hasty", append(args, "1s")...)
	a := shell(t, "outlives its frontend", "sleep "+outlivesFrontend+"; echo done")
	r := begin(t, dial(t, hasty.field(t, "grpc")), a)
	pid, _ := awaitSleeper(t, outlivesFrontend, f.workers...)
	hasty.stop(t)
	if _, err := result(r.stream); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream at the frontend that stopped = %v, want UNAVAILABLE", err)
	}
	wait, err := c.runs.WaitExecution(t.Context(), &repb.WaitExecutionRequest{Name: r.name})
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: a.digest})
	if err != nil {
		t.Fatal(err)
	}
	for what, stream := range map[string]grpc.ServerStreamingClient[longrunningpb.Operation]{"WaitExecution": wait, "Execute": again} {
		if op, err := stream.Recv(); err != nil || operationOf(op.GetName()) != operationOf(r.name) || op.GetDone() {
			t.Fatalf("%s at the other frontend = %v, %v, want the running operation %s", what, op, err, r.name)
		}
	}
	if pids := sleepers(t, outlivesFrontend); len(pids) != 1 || pids[0] != pid {
		t.Errorf("the action runs as %v, want it to go on as %d", pids, pid)
	}
	if err := syscall.Kill(pid, syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	for what, stream := range map[string]grpc.ServerStreamingClient[longrunningpb.Operation]{"WaitExecution": wait, "Execute": again} {
		response, err := result(stream)
		if err != nil || response.GetStatus().GetCode() != 0 || response.GetResult().GetExitCode() != 0 {
			t.Errorf("%s at the other frontend ended with %v, %v", what, response, err)
		}
	}

	patient := start(t, "patient", append(args, "1m")...)
	r = begin(t, dial(t, patient.field(t, "grpc")), shell(t, "ends in time", "sleep "+endsInTime+"; echo done"))
	pid, _ = awaitSleeper(t, endsInTime, f.workers...)
	if err := patient.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	probe := dial(t, patient.field(t, "grpc"))
	await(t, readyWithin, "frontend that refuses", func() bool {
		_, err := probe.execute(t.Context(), a.digest)
		return status.Code(err) == codes.Unavailable
	})
	if err := syscall.Kill(pid, syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	if response, err := result(r.stream); err != nil || response.GetResult().GetExitCode() != 0 {
		t.Errorf("the stream that ended while its frontend drained: %v, %v", response, err)
	}
	await(t, stopWithin, "end of the frontend, which has nothing left to do", func() bool {
		select {
		case <-patient.ended:
			return true
		default:
			return false
		}
	})
	if patient.err != nil {
		t.Errorf("the frontend that drained ended with %v", patient.err)
	}
}

// operationOf cuts off what the name of an operation has for whom it was given to.
func operationOf(name string) string {
	operation, _, _ := strings.Cut(name, "-")
	return operation
}
