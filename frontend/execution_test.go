package frontend_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// operationStream is an Execute or WaitExecution stream.
type operationStream struct {
	grpc.ServerStreamingClient[longrunningpb.Operation]
}

// execute opens an Execute stream.
func (h *harness) execute(ctx context.Context, t testing.TB, req *repb.ExecuteRequest) operationStream {
	t.Helper()
	stream, err := h.exec.Execute(ctx, req)
	if err != nil {
		t.Fatalf("Execute: %v", err)
	}
	return operationStream{stream}
}

// wait opens a WaitExecution stream.
func (h *harness) wait(t testing.TB, name string) operationStream {
	t.Helper()
	stream, err := h.exec.WaitExecution(t.Context(), &repb.WaitExecutionRequest{Name: name})
	if err != nil {
		t.Fatalf("WaitExecution: %v", err)
	}
	return operationStream{stream}
}

// recv returns the next operation and its metadata.
func recv(t testing.TB, stream operationStream) (*longrunningpb.Operation, *repb.ExecuteOperationMetadata) {
	t.Helper()
	op, err := stream.Recv()
	if err != nil {
		t.Fatalf("Recv: %v", err)
	}
	return op, metadataOf(t, op)
}

func metadataOf(t testing.TB, op *longrunningpb.Operation) *repb.ExecuteOperationMetadata {
	t.Helper()
	meta := new(repb.ExecuteOperationMetadata)
	if err := op.GetMetadata().UnmarshalTo(meta); err != nil {
		t.Fatalf("metadata of %s: %v", op.GetName(), err)
	}
	return meta
}

// await receives until the operation has a stage.
func await(t testing.TB, stream operationStream, stage repb.ExecutionStage_Value) *longrunningpb.Operation {
	t.Helper()
	for {
		if op, meta := recv(t, stream); meta.GetStage() == stage {
			return op
		}
	}
}

// finish receives to the end of a stream and checks what holds for every stream (rows EXA-1, EXA-3,
// EXA-4, OPS-1 to OPS-3). It returns the response and the operation's name.
func finish(t testing.TB, stream operationStream, action digest.Digest) (*repb.ExecuteResponse, string) {
	t.Helper()
	var last *longrunningpb.Operation
	for {
		op, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("Recv: %v", err)
		}
		meta := metadataOf(t, op)
		switch {
		case last.GetDone():
			t.Fatalf("a message after the last one: %v", op)
		case op.GetError() != nil:
			t.Fatalf("Operation.error is set: %v", op)
		case op.GetName() == "" || last != nil && op.GetName() != last.GetName():
			t.Fatalf("the name changed from %q to %q", last.GetName(), op.GetName())
		case op.GetDone() != (meta.GetStage() == repb.ExecutionStage_COMPLETED) || op.GetDone() != (op.GetResponse() != nil):
			t.Fatalf("done, stage and response do not agree: %v", op)
		case meta.GetStage() == repb.ExecutionStage_UNKNOWN || !proto.Equal(meta.GetActionDigest(), action.Proto()) || meta.GetDigestFunction() != repb.DigestFunction_SHA256:
			t.Fatalf("metadata %v", meta)
		}
		last = op
	}
	if !last.GetDone() {
		t.Fatalf("the stream ended without a done operation, after %v", last)
	}
	return responseOf(t, last), last.GetName()
}

func responseOf(t testing.TB, op *longrunningpb.Operation) *repb.ExecuteResponse {
	t.Helper()
	response := new(repb.ExecuteResponse)
	if err := op.GetResponse().UnmarshalTo(response); err != nil {
		t.Fatalf("response of %s: %v", op.GetName(), err)
	}
	return response
}

// queue is a worker that the test plays.
func (h *harness) queue(t testing.TB, platform ...broker.Property) *broker.Queue {
	t.Helper()
	return brokertest.Queue(t, h.broker, broker.WorkerInfo{Name: "w1", Slots: 1, Platform: platform})
}

// begin takes the next job and begins it.
func begin(t testing.TB, q *broker.Queue) *broker.Lease {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Second, errors.New("no job within 10 s"))
	defer cancel()
	lease, err := q.Next(ctx)
	if err != nil {
		t.Fatalf("Next: %v", err)
	}
	if err := lease.Begin(t.Context()); err != nil {
		t.Fatalf("Begin: %v", err)
	}
	return lease
}

func settle(t testing.TB, lease *broker.Lease, response *repb.ExecuteResponse) {
	t.Helper()
	if err := lease.Settle(t.Context(), broker.Outcome{Response: encode(response)}); err != nil {
		t.Fatalf("Settle: %v", err)
	}
}

func TestEXA_1_EXA_3_EXA_4_EXA_5_OPS_1_OPS_2_OPS_3_ExecuteRunsToItsEnd(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	action, result := h.action(t), h.result(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "build.bazel.remote.execution.v2.requestmetadata-bin",
		string(encode(&repb.RequestMetadata{ToolInvocationId: "inv"})))
	var stream operationStream
	within(t, "the first message", func() { // rows EXA-5 and WAIT-1
		stream = h.execute(ctx, t, &repb.ExecuteRequest{
			ActionDigest: action.Proto(), ExecutionPolicy: &repb.ExecutionPolicy{Priority: -3},
			InlineStdout: true, InlineOutputFiles: []string{"a/b.d"},
		})
		_, meta := recv(t, stream)
		if meta.GetStage() != repb.ExecutionStage_QUEUED || meta.GetPartialExecutionMetadata().GetQueuedTimestamp() == nil {
			t.Errorf("OPS-7 WAIT-1 first metadata %v, want QUEUED and since when", meta)
		}
	})
	lease := begin(t, q)
	if job := lease.Job(); job.Action != action || job.Priority != -3 || job.Metadata.GetToolInvocationId() != "inv" || job.SkipCacheLookup || job.DoNotCache {
		t.Errorf("job %+v", job)
	}
	op := await(t, stream, repb.ExecutionStage_EXECUTING)
	if w := metadataOf(t, op).GetPartialExecutionMetadata().GetWorker(); w != "w1" { // row OPS-7
		t.Errorf("OPS-7 worker %q, want w1", w)
	}
	waiter := h.wait(t, op.GetName())
	recv(t, waiter)
	settle(t, lease, &repb.ExecuteResponse{Result: result, Status: &statuspb.Status{}, Message: "hello"})
	want := &repb.ExecuteResponse{Result: proto.CloneOf(result), Status: &statuspb.Status{}, Message: "hello"}
	got, name := finish(t, waiter, action)
	if diff := diffMessages(want, got); diff != "" || name != op.GetName() {
		t.Errorf("WAIT-2 WaitExecution of %s (-want +got):\n%s", name, diff)
	}
	want.Result.StdoutRaw, want.Result.OutputFiles[0].Contents = []byte("out"), []byte("deps of b") // row EXA-31
	if got, _ = finish(t, stream, action); diffMessages(want, got) != "" {
		t.Errorf("EXA-31 Execute (-want +got):\n%s", diffMessages(want, got))
	}
	// Rows WAIT-4 and WAIT-8: the operation stays, for every frontend.
	got, _ = finish(t, startOn(t, h.farm).wait(t, name), action)
	if got.GetMessage() != "hello" {
		t.Errorf("WAIT-4 WAIT-8 WaitExecution of a done operation on another frontend = %v", got)
	}
}

func TestEXA_2_ExecuteRequestErrors(t *testing.T) {
	h := start(t)
	valid := h.action(t).Proto()
	for row, req := range map[string]*repb.ExecuteRequest{
		"EXA-27 priority":     {ActionDigest: valid, ExecutionPolicy: &repb.ExecutionPolicy{Priority: 1001}},
		"X-102 priority":      {ActionDigest: valid, ExecutionPolicy: &repb.ExecutionPolicy{Priority: -1 << 31}},
		"EXA-29 priority":     {ActionDigest: valid, ResultsCachePolicy: &repb.ResultsCachePolicy{Priority: -1001}},
		"GEN-15 function":     {ActionDigest: valid, DigestFunction: 77},
		"GEN-15 GITSHA1":      {ActionDigest: valid, DigestFunction: repb.DigestFunction_GITSHA1},
		"GEN-4 instance name": {ActionDigest: valid, InstanceName: "a/blobs"},
		"GEN-11 nothing":      {},
	} {
		_, err := h.execute(t.Context(), t, req).Recv()
		wantCode(t, row, err, codes.InvalidArgument)
	}
	for row, bad := range badDigests() {
		_, err := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: bad}).Recv()
		wantCode(t, row, err, codes.InvalidArgument)
	}
	cacheOnly := startOn(t, h.farm, func(c *frontend.Config) { c.ExecEnabled = false })
	_, err := cacheOnly.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: valid}).Recv()
	wantCode(t, "EXA-26 execution is off", err, codes.FailedPrecondition, "turned off")
	if details := status.Convert(err).Details(); len(details) != 0 {
		t.Errorf("EXA-26 details %v, want none", details)
	}
}

// Decisions D6 and D7: what is wrong with blobs is said in a done operation.
func TestExecuteRefusesActions(t *testing.T) {
	h := start(t)
	m, n := absent(), absent()
	for row, test := range map[string]struct {
		action  digest.Digest
		code    codes.Code
		missing []digest.Digest
	}{
		"EXA-6 action absent":      {m, codes.FailedPrecondition, []digest.Digest{m}},
		"X-37 absent and huge":     {must(space.New(m.Hash(), 1<<40)), codes.FailedPrecondition, []digest.Digest{must(space.New(m.Hash(), 1<<40))}},
		"GEN-21 impossible":        {impossibleDigest, codes.FailedPrecondition, []digest.Digest{impossibleDigest}},
		"EXA-7 command, root":      {h.action(t, func(a *repb.Action, _ *repb.Command) { a.CommandDigest, a.InputRootDigest = m.Proto(), n.Proto() }), codes.FailedPrecondition, []digest.Digest{m, n}},
		"EXV-1 no action":          {h.put(t, []byte("text")), codes.InvalidArgument, nil},
		"X-91 empty action":        {emptyDigest, codes.InvalidArgument, nil},
		"EXV-2 no input root":      {h.action(t, func(a *repb.Action, _ *repb.Command) { a.InputRootDigest = nil }), codes.InvalidArgument, nil},
		"EXV-2 bad command":        {h.action(t, func(a *repb.Action, _ *repb.Command) { a.CommandDigest = &repb.Digest{Hash: "x"} }), codes.InvalidArgument, nil},
		"EXV-1 command is no one":  {h.action(t, func(a *repb.Action, _ *repb.Command) { a.CommandDigest = h.put(t, []byte("text")).Proto() }), codes.InvalidArgument, nil},
		"EXA-17 timeout above max": {h.action(t, func(a *repb.Action, _ *repb.Command) { a.Timeout = durationpb.New(25 * time.Hour) }), codes.InvalidArgument, nil},
		"EXA-19 negative timeout":  {h.action(t, func(a *repb.Action, _ *repb.Command) { a.Timeout = durationpb.New(-time.Second) }), codes.InvalidArgument, nil},
		"X-99 odd timeout":         {h.action(t, func(a *repb.Action, _ *repb.Command) { a.Timeout = &durationpb.Duration{Seconds: 1, Nanos: -1} }), codes.InvalidArgument, nil},
		"X-100 platform": {h.action(t, func(a *repb.Action, _ *repb.Command) {
			a.Platform = &repb.Platform{Properties: make([]*repb.Platform_Property, 10_000)}
		}), codes.InvalidArgument, nil},
		"X-77 huge action": {h.put(t, make([]byte, 2<<20)), codes.InvalidArgument, nil},
	} {
		t.Run(row, func(t *testing.T) {
			got, name := finish(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: test.action.Proto()}), test.action)
			s := status.FromProto(got.GetStatus())
			if s.Code() != test.code || got.GetCachedResult() || got.GetResult() != nil {
				t.Fatalf("response %v, want %v", got, test.code)
			}
			if test.missing != nil {
				wantMissing(t, s, test.missing...)
			} else if len(s.Details()) != 0 {
				t.Errorf("details %v, want none", s.Details())
			}
			_, err := h.wait(t, name).Recv()
			wantCode(t, "WaitExecution", err, codes.NotFound)
		})
	}
	if n := h.farm.Messages(t, "JOBS"); n != 0 {
		t.Errorf("%d jobs are queued, want none", n)
	}
}

// Rows EXA-12, EXA-26 and EXV-30: a hit needs no worker and no action.
func TestEXA_12_EXV_30_CacheHit(t *testing.T) {
	h := start(t)
	action, result := absent(), h.result(t)
	h.cache(t, action, result)
	got, name := finish(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto(), InlineStderr: true}), action)
	want := &repb.ExecuteResponse{Result: proto.CloneOf(result), CachedResult: true, Status: &statuspb.Status{}}
	want.Result.StderrRaw = []byte("err")
	if diff := diffMessages(want, got); diff != "" {
		t.Errorf("Execute (-want +got):\n%s", diff)
	}
	again, other := finish(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()}), action)
	if name == other || len(name) < 26 || !again.GetCachedResult() {
		t.Errorf("names %q and %q, want two that nobody guesses", name, other)
	}
	_, err := h.wait(t, name).Recv()
	wantCode(t, "WaitExecution", err, codes.NotFound)
	if n := h.farm.Messages(t, "JOBS"); n != 0 {
		t.Errorf("%d jobs are queued, want none", n)
	}
}

// Row EXA-14: skip_cache_lookup runs although there is a result.
func TestEXA_14_SkipCacheLookup(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	action := h.action(t)
	h.cache(t, action, h.result(t))
	stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto(), SkipCacheLookup: true})
	lease := begin(t, q)
	if !lease.Job().SkipCacheLookup {
		t.Error("the job does not say skip_cache_lookup")
	}
	settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 5}})
	if got, _ := finish(t, stream, action); got.GetCachedResult() || got.GetResult().GetExitCode() != 5 {
		t.Errorf("response %v, want the worker's", got)
	}
}

// Row EXA-16: equal actions share a run; row EXA-15: not those that are do_not_cache.
func TestEXA_16_EXA_15_EqualActionsRunOnce(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	action := h.action(t)
	const clients = 20
	streams := make([]operationStream, clients)
	for i := range streams {
		streams[i] = h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
		recv(t, streams[i])
	}
	lease := begin(t, q)
	if n := h.farm.Messages(t, "JOBS"); n != 1 {
		t.Errorf("%d jobs, want 1", n)
	}
	settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 7}})
	for _, stream := range streams {
		if got, _ := finish(t, stream, action); got.GetResult().GetExitCode() != 7 {
			t.Errorf("response %v", got)
		}
	}

	private := h.action(t, func(a *repb.Action, _ *repb.Command) { a.DoNotCache = true })
	one := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: private.Proto()})
	two := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: private.Proto()})
	first, _ := recv(t, one)
	second, _ := recv(t, two)
	if first.GetName() == second.GetName() {
		t.Error("two do_not_cache actions share an operation")
	}
	for range 2 {
		lease := begin(t, q)
		if !lease.Job().DoNotCache {
			t.Error("the job does not say do_not_cache")
		}
		settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{}})
	}
	finish(t, one, private)
	finish(t, two, private)
}

// A result that appears between the first look and the queue is found by the second look.
func TestExecuteLooksAgainBeforeQueueing(t *testing.T) {
	var h *harness
	var action digest.Digest
	var result *repb.ActionResult
	looked := 0
	store := castest.NewMemory()
	h = start(t, func(c *frontend.Config) {
		c.Blobs = &castest.Faulty{Store: store, Plan: func(op castest.Op, d digest.Digest) castest.Fault {
			if op == castest.OpOpen && d == action && looked == 0 { // after the first look, before the queue
				looked++
				h.cache(t, action, result)
			}
			return castest.Fault{}
		}}
	})
	action = h.action(t)
	result = &repb.ActionResult{ExitCode: 0, ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "other"}}
	got, _ := finish(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()}), action)
	if !got.GetCachedResult() || got.GetResult().GetExecutionMetadata().GetWorker() != "other" || looked != 1 {
		t.Errorf("response %v, want the cached result", got)
	}
	if n := h.farm.Messages(t, "JOBS"); n != 0 {
		t.Errorf("%d jobs are queued, want none", n)
	}
}

// Row EXA-20: the action's platform, else the command's.
func TestEXA_20_EXA_22_EXA_23_Platform(t *testing.T) {
	platform := func(values ...string) *repb.Platform {
		p := &repb.Platform{}
		for _, value := range values {
			p.Properties = append(p.Properties, &repb.Platform_Property{Name: "pool", Value: value})
		}
		return p
	}
	farm := brokertest.Start(t)
	impatient := farm.ClientWith(t, broker.Config{Patience: -1})
	h := startOn(t, farm, func(c *frontend.Config) { c.Broker = impatient })
	h.queue(t, broker.Property{Name: "pool", Value: "a"}, broker.Property{Name: "pool", Value: "c"})
	eventually(t, "the worker is known", func() bool { return len(impatient.Workers()) == 1 })
	for row, test := range map[string]struct {
		action, command *repb.Platform
		served          bool
	}{
		"both, the action's counts":         {platform("a"), platform("b"), true},
		"both, the action's is not served":  {platform("b"), platform("a"), false},
		"only the command's":                {nil, platform("a"), true},
		"only the command's, not served":    {nil, platform("b"), false},
		"neither":                           {nil, nil, true},
		"EXA-22 two values of a worker's":   {platform("a", "c"), nil, true},
		"EXA-22 one of two is not served":   {platform("a", "b"), nil, false},
		"an empty one is the action's, too": {&repb.Platform{}, platform("b"), true},
	} {
		t.Run(row, func(t *testing.T) {
			action := h.action(t, func(a *repb.Action, c *repb.Command) {
				a.Platform, c.Platform = test.action, test.command //nolint:staticcheck // REAPI 2.0
			})
			stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
			if test.served {
				if _, meta := recv(t, stream); meta.GetStage() == repb.ExecutionStage_COMPLETED {
					t.Errorf("metadata %v, want it queued", meta)
				}
				return
			}
			got, _ := finish(t, stream, action) // row EXA-23
			if s := status.FromProto(got.GetStatus()); s.Code() != codes.FailedPrecondition || len(s.Details()) != 0 || !strings.Contains(s.Message(), "pool") {
				t.Errorf("status %v, want FAILED_PRECONDITION with the property and no details", s)
			}
		})
	}
}

// Row EXA-25.
func TestEXA_25_X_105_QueueFull(t *testing.T) {
	farm := brokertest.Start(t)
	h := startOn(t, farm, func(c *frontend.Config) { c.Broker = farm.ClientWith(t, broker.Config{MaxQueued: 2}) })
	for range 2 {
		recv(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()}))
	}
	private := h.action(t, func(a *repb.Action, _ *repb.Command) { a.DoNotCache = true })
	_, err := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: private.Proto(), SkipCacheLookup: true}).Recv()
	wantCode(t, "X-103 one that is never cached", err, codes.ResourceExhausted, "queue")
	_, err = h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()}).Recv()
	wantCode(t, "the third", err, codes.ResourceExhausted, "queue")
	details := status.Convert(err).Details()
	if len(details) != 1 {
		t.Fatalf("details %v, want a RetryInfo", details)
	}
	if retry, ok := details[0].(*errdetails.RetryInfo); !ok || retry.GetRetryDelay().AsDuration() <= 0 {
		t.Errorf("detail %v, want a RetryInfo", details[0])
	}
}

// A response that is too large for the broker travels as a blob.
func TestExecuteResponseBlob(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	for row, test := range map[string]struct {
		outputs int
		code    codes.Code
	}{
		"fits into a message":          {10_000, codes.OK},
		"EXO-34 no client receives it": {50_000, codes.FailedPrecondition},
	} {
		t.Run(row, func(t *testing.T) {
			action := h.action(t)
			response := &repb.ExecuteResponse{Result: &repb.ActionResult{}}
			for i := range test.outputs {
				response.Result.OutputFiles = append(response.Result.OutputFiles, &repb.OutputFile{Path: fmt.Sprintf("out/%030d", i), Digest: emptyDigest.Proto()})
			}
			stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
			lease := begin(t, q)
			d := h.putMessage(t, response)
			if err := lease.Settle(t.Context(), broker.Outcome{ResponseBlob: d}); err != nil {
				t.Fatalf("Settle: %v", err)
			}
			got, _ := finish(t, stream, action)
			if codes.Code(got.GetStatus().GetCode()) != test.code {
				t.Fatalf("status %v, want %v", got.GetStatus(), test.code)
			}
			if n := len(got.GetResult().GetOutputFiles()); test.code == codes.OK && n != test.outputs {
				t.Errorf("%d output files, want %d", n, test.outputs)
			}
		})
	}
	t.Run("the blob is gone", func(t *testing.T) {
		action := h.action(t)
		stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
		op, _ := recv(t, stream)
		if err := begin(t, q).Settle(t.Context(), broker.Outcome{ResponseBlob: absent()}); err != nil {
			t.Fatalf("Settle: %v", err)
		}
		_, err := stream.Recv()
		for err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, "Execute, which a client tries again", err, codes.Unavailable)
		_, err = h.wait(t, op.GetName()).Recv()
		wantCode(t, "WaitExecution, after which it executes anew", err, codes.NotFound)
	})
}
