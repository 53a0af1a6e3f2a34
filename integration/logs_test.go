package integration_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Each action that waits sleeps for a duration of its own; a test that has seen enough ends the sleep, with
// a signal of which the shell says nothing.
const (
	logRuns       = "600.0501"
	logMoves      = "600.0503"
	logIsCut      = "600.0507"
	logTimesOut   = "600.0511"
	logIsSlow     = "600.0513"
	logLeaves     = "600.0517"
	logIsPrinted  = "600.0521"
	logAtShutdown = "600.0523"
	logIsShared   = "600.0529"
)

// A runningLog is an action that runs and the stream of its operation.
type runningLog struct {
	c      *client
	stream grpc.ServerStreamingClient[longrunningpb.Operation]
	name   string
	meta   *repb.ExecuteOperationMetadata
}

// begin executes an action and returns when it runs.
func begin(t *testing.T, c *client, a *action) *runningLog {
	t.Helper()
	if err := c.put(t.Context(), a.blobs...); err != nil {
		t.Fatal(err)
	}
	stream, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: a.digest})
	if err != nil {
		t.Fatal(err)
	}
	for {
		op, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		meta := new(repb.ExecuteOperationMetadata)
		if err := op.GetMetadata().UnmarshalTo(meta); err != nil {
			t.Fatal(err)
		}
		if meta.GetStage() == repb.ExecutionStage_EXECUTING {
			return &runningLog{c: c, stream: stream, name: op.GetName(), meta: meta}
		}
	}
}

// cancel cancels the operation and returns its response.
func (r *runningLog) cancel(t *testing.T) *repb.ExecuteResponse {
	t.Helper()
	if _, err := longrunningpb.NewOperationsClient(r.c.conn).CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: r.name}); err != nil {
		t.Fatal(err)
	}
	response, err := result(r.stream)
	if err != nil {
		t.Fatal(err)
	}
	return response
}

// Row X-111: equal actions of two clients run once; when one client cancels, at any frontend, the other one's goes on,
// and when both have, the command is killed.
func TestX_111_CommandLivesUntilAllHaveCancelled(t *testing.T) {
	f := startSplit(t, 2, 1)
	a := shell(t, "shared", "sleep "+logIsShared)
	one := begin(t, dial(t, f.endpoint(t)), a)
	two := begin(t, dial(t, f.frontends[1].field(t, "grpc")), a)
	if one.meta.GetStdoutStreamName() != two.meta.GetStdoutStreamName() {
		t.Fatal("equal actions do not share a run")
	}
	pid, _ := awaitSleeper(t, logIsShared, f.workers...)
	one.c, two.c = two.c, one.c
	if got := codes.Code(one.cancel(t).GetStatus().GetCode()); got != codes.Canceled {
		t.Errorf("who cancels is told %v", got)
	}
	quiet := time.NewTimer(3 * time.Second) // longer than a kill takes
	<-quiet.C
	if parent(pid) == 0 {
		t.Fatal("the command is killed although somebody waits for it")
	}
	if got := codes.Code(two.cancel(t).GetStatus().GetCode()); got != codes.Canceled {
		t.Errorf("who cancels last is told %v", got)
	}
	await(t, 5*time.Second, "end of the command that nobody wants", func() bool { return parent(pid) == 0 })
}

// A logReader reads a log stream.
type logReader struct {
	stream grpc.ServerStreamingClient[bytestream.ReadResponse]
	text   strings.Builder
}

func (c *client) log(ctx context.Context, t *testing.T, name string, offset, limit int64) *logReader {
	t.Helper()
	stream, err := c.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: name, ReadOffset: offset, ReadLimit: limit})
	if err != nil {
		t.Fatal(err)
	}
	return &logReader{stream: stream}
}

// until reads until the text has come.
func (r *logReader) until(t *testing.T, text string) {
	t.Helper()
	for !strings.Contains(r.text.String(), text) {
		response, err := r.stream.Recv()
		if err != nil {
			t.Fatalf("%v after %q, want %q", err, r.text.String(), text)
		}
		r.text.Write(response.GetData())
	}
}

// all reads to the end.
func (r *logReader) all() (string, error) {
	for {
		response, err := r.stream.Recv()
		if errors.Is(err, io.EOF) {
			return r.text.String(), nil
		}
		if err != nil {
			return r.text.String(), err
		}
		r.text.Write(response.GetData())
	}
}

func (r *logReader) want(t *testing.T, want string) {
	t.Helper()
	if got, err := r.all(); err != nil || got != want {
		t.Errorf("the log is %.200q, %v, want %.200q", got, err, want)
	}
}

// Rows OPS-8, LOG-3 and LOG-5: whoever reads while the action runs sees what it has written, from the
// beginning, at any frontend, and to the end; whoever comes late sees the same.
func TestOPS_8_LogWhileTheActionRuns(t *testing.T) {
	f := startSplit(t, 2, 1)
	c, other := dial(t, f.endpoint(t)), dial(t, f.frontends[1].field(t, "grpc"))
	r := begin(t, c, shell(t, "log", "echo early; echo trouble >&2; sleep "+logRuns+"; echo late"))
	if r.meta.GetStdoutStreamName() == "" || r.meta.GetStderrStreamName() == "" {
		t.Fatalf("metadata without stream names: %v", r.meta)
	}
	stdout := []*logReader{c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0), other.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0)}
	stderr := other.log(t.Context(), t, r.meta.GetStderrStreamName(), 0, 0)
	for _, reader := range stdout {
		reader.until(t, "early\n")
	}
	stderr.until(t, "trouble\n")
	other.log(t.Context(), t, r.meta.GetStdoutStreamName(), 1, 3).want(t, "arl")
	ahead := other.log(t.Context(), t, r.meta.GetStdoutStreamName(), 8, 0)

	pid, _ := awaitSleeper(t, logRuns, f.workers...)
	if err := syscall.Kill(pid, syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	for _, reader := range stdout {
		reader.want(t, "early\nlate\n")
	}
	stderr.want(t, "trouble\n")
	ahead.want(t, "te\n")
	if response, err := result(r.stream); err != nil || response.GetResult().GetExitCode() != 0 {
		t.Fatalf("response %v, %v", response, err)
	}
	c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0).want(t, "early\nlate\n")
	c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 6, 2).want(t, "la")
	c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 11, 0).want(t, "")
	c.log(t.Context(), t, r.meta.GetStderrStreamName(), 0, 0).want(t, "trouble\n")
	_, err := c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 12, 0).all()
	if status.Code(err) != codes.OutOfRange {
		t.Errorf("reading behind the end = %v, want OUT_OF_RANGE", err)
	}
}

// Rows LOG-1 and LOG-2: clients only read, and names that are no log are errors.
func TestLOG_2_NamesOfLogs(t *testing.T) {
	c := dial(t, startUp(t).endpoint(t))
	a := shell(t, "log names", "echo text")
	if err := c.put(t.Context(), a.blobs...); err != nil {
		t.Fatal(err)
	}
	stream, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: a.digest})
	if err != nil {
		t.Fatal(err)
	}
	var op *longrunningpb.Operation
	for !op.GetDone() {
		if op, err = stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	meta := new(repb.ExecuteOperationMetadata)
	if err := op.GetMetadata().UnmarshalTo(meta); err != nil {
		t.Fatal(err)
	}
	name := meta.GetStdoutStreamName()
	c.log(t.Context(), t, name, 0, 0).want(t, "text\n")
	for bad, want := range map[string]codes.Code{
		name + "/token": codes.InvalidArgument,
		strings.TrimSuffix(name, "stdout") + "nothing":                 codes.InvalidArgument,
		strings.TrimSuffix(name, "/stdout"):                            codes.InvalidArgument,
		"other/" + name:                                                codes.NotFound,
		"operations/" + strings.Repeat("A", 26) + "/logstreams/stdout": codes.NotFound,
		"operations/a.>/logstreams/stdout":                             codes.NotFound,
		"operations//logstreams/stdout":                                codes.NotFound,
	} {
		if text, err := c.log(t.Context(), t, bad, 0, 0).all(); status.Code(err) != want {
			t.Errorf("Read(%s) = %q, %v, want %v", bad, text, err, want)
		}
	}
	for _, numbers := range [][2]int64{{-1, 0}, {0, -1}} {
		if text, err := c.log(t.Context(), t, name, numbers[0], numbers[1]).all(); err == nil {
			t.Errorf("Read with the offset %d and the limit %d = %q", numbers[0], numbers[1], text)
		}
	}
	write, err := c.streams.Write(t.Context())
	if err == nil {
		if err = write.Send(&bytestream.WriteRequest{ResourceName: name, FinishWrite: true, Data: []byte("forged")}); err == nil {
			_, err = write.CloseAndRecv()
		}
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("Write to a log = %v, want INVALID_ARGUMENT", err)
	}
}

// Row LOG-4: the next attempt writes the log again from the start, and a reader goes on where it was: it
// sees no byte twice.
func TestLOG_4_LogOfAnActionThatMoves(t *testing.T) {
	f := startSplit(t, 1, 2)
	c := dial(t, f.endpoint(t))
	r := begin(t, c, shell(t, "log moves", "echo early; sleep "+logMoves+"; echo late"))
	reader := c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0)
	reader.until(t, "early\n")
	_, owner := awaitSleeper(t, logMoves, f.workers...)
	owner.kill(t)
	other := f.workers[0]
	if owner == other {
		other = f.workers[1]
	}
	pid, _ := awaitSleeper(t, logMoves, other)
	late := c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0)
	late.until(t, "early\n")
	if err := syscall.Kill(pid, syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	reader.want(t, "early\nlate\n")
	late.want(t, "early\nlate\n")
}

// What an action has written is kept when it is cancelled, for those who read and those who come later.
func TestLogOfACancelledAction(t *testing.T) {
	f := startSplit(t, 2, 1)
	c, other := dial(t, f.endpoint(t)), dial(t, f.frontends[1].field(t, "grpc"))
	r := begin(t, c, shell(t, "log is cut", "echo out; echo err >&2; sleep "+logIsCut))
	reader := other.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0)
	reader.until(t, "out\n")
	if got := codes.Code(r.cancel(t).GetStatus().GetCode()); got != codes.Canceled {
		t.Fatalf("status %v, want CANCELLED", got)
	}
	other.log(t.Context(), t, r.meta.GetStderrStreamName(), 0, 0).want(t, "err\n")
	reader.want(t, "out\n")
	f.workers[0].stop(t)
	c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0).want(t, "out\n")
	// The terminal state is what it was.
	wait, err := other.runs.WaitExecution(t.Context(), &repb.WaitExecutionRequest{Name: r.name})
	if err != nil {
		t.Fatal(err)
	}
	if response, err := result(wait); err != nil || codes.Code(response.GetStatus().GetCode()) != codes.Canceled || response.GetResult() != nil {
		t.Errorf("response %v, %v, want CANCELLED and no result", response, err)
	}
}

// So is what it has written when its time is over.
func TestLogOfAnActionThatTimesOut(t *testing.T) {
	c := dial(t, startUp(t).endpoint(t))
	a := shell(t, "log times out", "echo out; sleep "+logTimesOut)
	message := new(repb.Action)
	if err := proto.Unmarshal(a.blobs[len(a.blobs)-1], message); err != nil {
		t.Fatal(err)
	}
	message.Timeout = durationpb.New(2 * time.Second)
	blob, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	a.digest, a.blobs = digestOf(blob), append(a.blobs, blob)
	r := begin(t, c, a)
	reader := c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0)
	response, err := result(r.stream)
	if err != nil || codes.Code(response.GetStatus().GetCode()) != codes.DeadlineExceeded {
		t.Fatalf("response %v, %v, want DEADLINE_EXCEEDED", response, err)
	}
	reader.want(t, "out\n")
	c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0).want(t, "out\n")
}

// An action that writes more than it may is killed, and its log is as long as it may be, to the byte what
// its result names.
func TestLogOfAnActionThatWritesTooMuch(t *testing.T) {
	const most = 64 << 20
	f := startSplit(t, 1, 1)
	c := dial(t, f.endpoint(t))
	r := begin(t, c, shell(t, "log too long", "sleep 1; head -c 104857600 /dev/zero; sleep 60"))
	name := r.meta.GetStdoutStreamName()
	var readers errgroup.Group
	for range 2 {
		readers.Go(func() error {
			stream, err := c.streams.Read(t.Context(), &bytestream.ReadRequest{ResourceName: name})
			if err != nil {
				return err
			}
			size := 0
			for {
				response, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					return err
				}
				size += len(response.GetData())
			}
			if size != most {
				return fmt.Errorf("the log has %d bytes, want %d", size, most)
			}
			return nil
		})
	}
	response, err := result(r.stream)
	if err != nil || !strings.Contains(response.GetMessage(), "standard output exceeds") || response.GetResult().GetStdoutDigest().GetSizeBytes() != most {
		t.Errorf("message %q, digest %v, %v", response.GetMessage(), response.GetResult().GetStdoutDigest(), err)
	}
	if err := readers.Wait(); err != nil {
		t.Error(err)
	}
}

// A reader that does not receive holds up neither the action nor other readers, and one that leaves is
// gone.
func TestLogReadersDoNotMatterToTheAction(t *testing.T) {
	f := startUp(t)
	c := dial(t, f.endpoint(t))
	r := begin(t, c, shell(t, "log is slow", "head -c 33554432 /dev/zero; sleep "+logIsSlow))
	name := r.meta.GetStdoutStreamName()
	leaving, leave := context.WithCancel(t.Context())
	slow := c.log(leaving, t, name, 0, 0)
	if _, err := slow.stream.Recv(); err != nil {
		t.Fatal(err)
	}
	pid, _ := awaitSleeper(t, logIsSlow, f.up) // the action has written all of it
	c.log(t.Context(), t, name, 33554431, 1).want(t, "\x00")
	if err := syscall.Kill(pid, syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	if response, err := result(r.stream); err != nil || response.GetResult().GetStdoutDigest().GetSizeBytes() != 33554432 {
		t.Fatalf("response %v, %v", response, err)
	}
	leave()
	await(t, 10*time.Second, "end of the reader's call", func() bool {
		return strings.Contains(httpGet(t, "http://"+f.up.field(t, "http")+"/metrics"), `jetfarm_frontend_rpc_in_flight_calls{method="/google.bytestream.ByteStream/Read"} 0`)
	})
}

// A frontend that is shut down tells its readers to come again, and another one serves them on.
func TestLogReadersMoveWhenTheirFrontendStops(t *testing.T) {
	f := startSplit(t, 2, 1)
	c, other := dial(t, f.endpoint(t)), dial(t, f.frontends[1].field(t, "grpc"))
	r := begin(t, other, shell(t, "log at shutdown", "echo early; sleep "+logAtShutdown+"; echo late"))
	reader := c.log(t.Context(), t, r.meta.GetStdoutStreamName(), 0, 0)
	reader.until(t, "early\n")
	f.frontends[0].stop(t)
	if got, err := reader.all(); status.Code(err) != codes.Unavailable || got != "early\n" {
		t.Errorf("the log at the stopped frontend = %q, %v, want UNAVAILABLE", got, err)
	}
	again := other.log(t.Context(), t, r.meta.GetStdoutStreamName(), int64(len("early\n")), 0)
	pid, _ := awaitSleeper(t, logAtShutdown, f.workers...)
	if err := syscall.Kill(pid, syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	again.want(t, "late\n")
}

// An operator reads logs without a client of the farm.
func TestOperatorReadsLogs(t *testing.T) {
	f := startSplit(t, 1, 1)
	c := dial(t, f.endpoint(t))
	r := begin(t, c, shell(t, "log is printed", "echo early; echo trouble >&2; sleep "+logIsPrinted+"; echo late"))
	logs := func(args ...string) *exec.Cmd {
		args = append([]string{"ops", "logs", "--nats", f.broker.field(t, "nats")}, args...)
		return exec.CommandContext(t.Context(), binary(t), args...)
	}
	pid, _ := awaitSleeper(t, logIsPrinted, f.workers...)
	want := func(what, text string, args ...string) {
		t.Helper()
		if out, err := logs(args...).Output(); err != nil || string(out) != text {
			t.Errorf("%s: %q, %v, want %q", what, out, err, text)
		}
	}
	want("while it runs", "early\n", r.name)
	want("standard error while it runs", "trouble\n", "--stderr", r.name)
	var following errgroup.Group
	following.Go(func() error {
		out, err := logs("-f", r.name).Output()
		if err == nil && string(out) != "early\nlate\n" {
			err = fmt.Errorf("ops logs -f printed %q", out)
		}
		return err
	})
	if err := syscall.Kill(pid, syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	if err := following.Wait(); err != nil {
		t.Error(err)
	}
	want("after the end", "early\nlate\n", r.name)
	want("following after the end", "trouble\n", "-f", "--stderr", r.name)
	if out, err := logs(strings.Repeat("A", 26)).CombinedOutput(); err == nil || !strings.Contains(string(out), "operation not found") {
		t.Errorf("the log of an unknown operation: %s, %v", out, err)
	}
}
