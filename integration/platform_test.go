package integration_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// startOffering starts a worker that offers platform properties.
func (f *splitFarm) startOffering(t testing.TB, name string, properties ...string) *process {
	t.Helper()
	args := []string{"worker", "--nats", f.broker.field(t, "nats"), "--data", filepath.Join(f.data, name), "--name", name, "--http", "127.0.0.1:0", "--concurrency", "1"}
	for _, p := range properties {
		args = append(args, "--platform", p)
	}
	return start(t, name, args...)
}

// startPatient starts a frontend with a patience.
func (f *splitFarm) startPatient(t testing.TB, patience string) *client {
	t.Helper()
	p := start(t, "patient", "frontend", "--nats", f.broker.field(t, "nats"), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--patience", patience)
	return dial(t, p.field(t, "grpc"))
}

// asking makes an action ask for a platform, or, as clients of older versions do, its command.
func asking(t *testing.T, salt string, inCommand bool, pairs ...string) *action {
	t.Helper()
	platform := &repb.Platform{}
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		platform.Properties = append(platform.Properties, &repb.Platform_Property{Name: name, Value: value})
	}
	command := &repb.Command{Arguments: []string{"/bin/true"}}
	if inCommand {
		command.Platform = platform //nolint:staticcheck // what clients of REAPI 2.0 and 2.1 send
	}
	a := newAction(t, salt, &repb.Directory{}, command)
	if inCommand {
		return a
	}
	message := new(repb.Action)
	if err := proto.Unmarshal(a.blobs[len(a.blobs)-1], message); err != nil {
		t.Fatal(err)
	}
	message.Platform = platform
	blob, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	a.digest, a.blobs = digestOf(blob), append(a.blobs, blob)
	return a
}

// executeAll executes an action and returns why it waited, as the first message says, and its response.
func executeAll(t *testing.T, c *client, a *action) (why string, response *repb.ExecuteResponse) {
	t.Helper()
	if err := c.put(t.Context(), a.blobs...); err != nil {
		t.Fatal(err)
	}
	stream, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: a.digest})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if first.GetDone() {
		response = new(repb.ExecuteResponse)
		if err := first.GetResponse().UnmarshalTo(response); err != nil {
			t.Fatal(err)
		}
		return whyOf(t, first), response
	}
	if response, err = result(stream); err != nil {
		t.Fatal(err)
	}
	return whyOf(t, first), response
}

// whyOf returns why an operation waits, or "".
func whyOf(t *testing.T, op *longrunningpb.Operation) string {
	t.Helper()
	meta := new(repb.ExecuteOperationMetadata)
	if err := op.GetMetadata().UnmarshalTo(meta); err != nil {
		t.Fatal(err)
	}
	for _, detail := range meta.GetPartialExecutionMetadata().GetAuxiliaryMetadata() {
		message := new(errdetails.LocalizedMessage)
		if detail.MessageIs(message) {
			if err := detail.UnmarshalTo(message); err != nil {
				t.Fatal(err)
			}
			return message.GetMessage()
		}
	}
	return ""
}

// The platform table: what runs where, and what the sentence says about what cannot run (rows EXA-20 to
// EXA-23).
func TestEXA_23_PlatformTable(t *testing.T) {
	f := startSplit(t, 0, 0)
	c := f.startPatient(t, "2s")
	f.startOffering(t, "small", "cores<=4", "arch=x86", "container-image=docker://debian")
	f.startOffering(t, "gpu", "OSFamily=Linux", "cores<=16", "memory<=64000", "gpu=a100", "gpu=a30")
	awaitWorkers(t, f, 2)

	for i, test := range []struct {
		asked  []string
		worker string // "" is any
	}{
		{nil, ""},
		{[]string{"OSFamily=linux"}, ""},
		{[]string{"OSFamily=LINUX"}, ""},
		{[]string{"OSFamily=linux", "OSFamily=Linux"}, ""},
		{[]string{"unheard=of", "unheard=too"}, ""},
		{[]string{"arch=x86"}, "small"},
		{[]string{"container-image=docker://debian", "OSFamily=Linux"}, "small"},
		{[]string{"gpu=a100"}, "gpu"},
		{[]string{"gpu=a30"}, "gpu"},
		{[]string{"gpu=a100", "gpu=a30"}, "gpu"},
		{[]string{"cores=4"}, ""},
		{[]string{"cores=0"}, ""},
		{[]string{"cores=0.5", "arch=x86"}, "small"},
		{[]string{"cores=4.0", "arch=x86"}, "small"},
		{[]string{"cores=4.5"}, "gpu"},
		{[]string{"cores=16"}, "gpu"},
		{[]string{"memory=64000", "cores=2"}, "gpu"},
		{[]string{"cores=2", "cores=8"}, "gpu"},
		{[]string{"persistentWorkerKey=k", "persistentWorkerProtocol=json", "supports-workers=1", "requires-worker-protocol=json", "arch=x86"}, "small"},
		{[]string{"cache-silo-key=k", "InputRootAbsolutePath=/b", "label:os=linux", "arch=x86"}, "small"},
	} {
		for _, inCommand := range []bool{false, true} {
			a := asking(t, fmt.Sprint("match ", i, inCommand), inCommand, test.asked...)
			why, response := executeAll(t, c, a)
			ran := response.GetResult().GetExecutionMetadata().GetWorker()
			if response.GetStatus().GetCode() != 0 || response.GetResult() == nil || test.worker != "" && ran != test.worker {
				t.Errorf("%v: %v on %q (%s), want it to run on %q", test.asked, response.GetStatus(), ran, why, test.worker)
			}
		}
	}

	for i, test := range []struct {
		asked    []string
		sentence []string // parts of it
	}{
		{[]string{"OSFamily=aix"}, []string{`the nearest is gpu: "OSFamily" is "Linux", the action asks for "aix"`}},
		{[]string{"OSFamily=windows", "arch=x86"}, []string{`the nearest is small: "OSFamily" is "linux", the action asks for "windows"`}},
		{[]string{"arch=arm"}, []string{`the nearest is small: "arch" is "x86", the action asks for "arm"`}},
		{[]string{"arch=X86", "container-image=docker://debian"}, []string{`the nearest is small: "arch" is "x86", the action asks for "X86"`}},
		{[]string{"gpu=h100", "cores=8"}, []string{`the nearest is gpu: "gpu" is "a100" or "a30", the action asks for "h100"`}},
		{[]string{"gpu=a100", "gpu=h100"}, []string{`the nearest is gpu: "gpu" is "a100" or "a30", the action asks for "h100"`}},
		{[]string{"cores=17"}, []string{`the nearest is gpu: "cores" is up to 16, the action asks for "17"`}},
		{[]string{"cores=5", "arch=x86"}, []string{`the nearest is small: "cores" is up to 4, the action asks for "5"`}},
		{[]string{"cores=many"}, []string{`the nearest is gpu: "cores" is up to 16, the action asks for "many", which is not a number`}},
		{[]string{"cores=-1"}, []string{`"cores" is up to 16, the action asks for "-1", which is not a number`}},
		{[]string{"cores=NaN"}, []string{`"cores" is up to 16, the action asks for "NaN", which is not a number`}},
		{[]string{"memory=64001"}, []string{`the nearest is gpu: "memory" is up to 64000, the action asks for "64001"`}},
		{[]string{"memory=1", "arch=x86"}, []string{`the nearest is gpu: "arch" is not declared, the action asks for "x86"`}},
		{[]string{"gpu=none"}, []string{`the nearest is gpu: "gpu" is "a100" or "a30", the action asks for "none"`}},
		{[]string{"gpu=a100", "arch=x86", "memory=99999", "cores=3"}, []string{
			`the nearest is gpu:`, `"arch" is not declared, the action asks for "x86"`, `"memory" is up to 64000, the action asks for "99999"`,
		}},
	} {
		why, response := executeAll(t, c, asking(t, fmt.Sprint("mismatch ", i), false, test.asked...))
		status := response.GetStatus()
		if codes.Code(status.GetCode()) != codes.FailedPrecondition || len(status.GetDetails()) > 0 || response.GetResult() != nil {
			t.Errorf("%v: %v, want FAILED_PRECONDITION without details", test.asked, response)
		}
		for _, text := range append(test.sentence, "no worker offers the platform", "no worker has offered it for a week") {
			if !strings.Contains(why, text) || !strings.Contains(status.GetMessage(), text) {
				t.Errorf("%v: at once %q, in the end %q, want %q in both", test.asked, why, status.GetMessage(), text)
			}
		}
	}

	for i, test := range []struct {
		asked    []string
		sentence string
	}{
		{[]string{"OSFamily=linux", "OSFamily=windows"}, `OSFamily "linux" and "windows"`},
		{[]string{"=x"}, "no name"},
		{[]string{"a=" + strings.Repeat("x", 2000)}, "1024 bytes"},
	} {
		_, response := executeAll(t, c, asking(t, fmt.Sprint("invalid ", i), false, test.asked...))
		if codes.Code(response.GetStatus().GetCode()) != codes.InvalidArgument || !strings.Contains(response.GetStatus().GetMessage(), test.sentence) {
			t.Errorf("%.40v: %v, want INVALID_ARGUMENT with %q", test.asked, response.GetStatus(), test.sentence)
		}
	}
}

// Row EXA-24: an action that no worker can run yet waits, says why, and runs when a worker comes; so it does
// when there is no worker at all.
func TestEXA_24_ActionsWaitForWorkersThatCome(t *testing.T) {
	f := startSplit(t, 1, 0)
	c := dial(t, f.endpoint(t))
	execute := func(salt string, asked ...string) grpc.ServerStreamingClient[longrunningpb.Operation] {
		t.Helper()
		a := asking(t, salt, false, asked...)
		if err := c.put(t.Context(), a.blobs...); err != nil {
			t.Fatal(err)
		}
		stream, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: a.digest})
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	first := func(stream grpc.ServerStreamingClient[longrunningpb.Operation], want string) {
		t.Helper()
		op, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if why := whyOf(t, op); !strings.Contains(why, want) {
			t.Errorf("it waits because %q, want %q in it", why, want)
		}
	}
	ran := func(stream grpc.ServerStreamingClient[longrunningpb.Operation], worker string) {
		t.Helper()
		response, err := result(stream)
		if got := response.GetResult().GetExecutionMetadata().GetWorker(); err != nil || got != worker {
			t.Errorf("%v ran on %q, %v, want %q", response.GetStatus(), got, err, worker)
		}
	}
	early := execute("before any worker", "kind=one")
	first(early, "there is none")
	one := f.startOffering(t, "one", "kind=one")
	ran(early, "one")
	waiting := execute("another kind", "kind=two")
	first(waiting, `"kind" is "one", the action asks for "two"`)
	f.startOffering(t, "two", "kind=two")
	ran(waiting, "two")
	one.stop(t) // scaled to zero
	awaitWorkers(t, f, 1)
	waiting = execute("one again", "kind=one")
	first(waiting, "here within a week and may come back")
	f.startOffering(t, "one again", "kind=one")
	ran(waiting, "one-again")
}

// awaitWorkers waits until the farm has as many workers.
func awaitWorkers(t *testing.T, f *splitFarm, n int) {
	t.Helper()
	await(t, readyWithin, "number of workers", func() bool {
		out, err := exec.CommandContext(t.Context(), binary(t), "workers", "ls", "--json", "--nats", f.broker.field(t, "nats")).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(out), "\n") == n
	})
}
