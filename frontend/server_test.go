package frontend_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// Row GEN-32: a panic is one INTERNAL, unary and in a stream, and the next call is served.
func TestGEN_32_Panic(t *testing.T) {
	panics := true
	h := start(t, func(c *frontend.Config) {
		c.Blobs = &castest.Faulty{Store: castest.NewMemory(), Plan: func(op castest.Op, _ digest.Digest) castest.Fault {
			if panics && op != castest.OpPut {
				panic("a bug in the store")
			}
			return castest.Fault{}
		}}
	})
	d := h.put(t, random(10))
	_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: protos(d)})
	wantCode(t, "FindMissingBlobs", err, codes.Internal, "internal error")
	_, err = h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
	wantCode(t, "Read", err, codes.Internal, "internal error")
	panics = false
	if h.missing(t, d) {
		t.Error("the next call says that the blob is missing")
	}
	if n := h.metric(t, "jetfarm_frontend_panics_total"); n != 2 {
		t.Errorf("%v panics are counted, want 2", n)
	}
}

// metric sums the values of a counter or gauge over its labels.
func (h *harness) metric(t testing.TB, name string) float64 {
	t.Helper()
	families, err := h.metrics.Gather()
	if err != nil {
		t.Fatalf("Gather: %v", err)
	}
	sum := 0.0
	for _, family := range families {
		if family.GetName() == name {
			for _, m := range family.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// Row GEN-24: what a client says of itself never fails a call.
func TestGEN_24_RequestMetadataGarbage(t *testing.T) {
	h := start(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "build.bazel.remote.execution.v2.requestmetadata-bin", "\xff\xff\xff")
	if _, err := h.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{}); err != nil {
		t.Errorf("FindMissingBlobs: %v", err)
	}
	if op, _ := recv(t, h.execute(ctx, t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()})); op.GetName() == "" {
		t.Error("Execute has no name")
	}
}

// Row GEN-33.
func TestGEN_33_HealthAndReflection(t *testing.T) {
	h := start(t)
	health := healthpb.NewHealthClient(h.conn)
	for _, service := range []string{"", "build.bazel.remote.execution.v2.Execution", "google.bytestream.ByteStream"} {
		resp, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("Check(%q) = %v, %v, want SERVING", service, resp, err)
		}
	}
	stream, err := reflectionpb.NewServerReflectionClient(h.conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatalf("ServerReflectionInfo: %v", err)
	}
	err = stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	if err != nil {
		t.Fatalf("Send: %v", err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatalf("Recv: %v", err)
	}
	listed := map[string]bool{}
	for _, service := range resp.GetListServicesResponse().GetService() {
		listed[service.GetName()] = true
	}
	for _, service := range []string{
		"build.bazel.remote.execution.v2.ActionCache", "build.bazel.remote.execution.v2.Capabilities",
		"build.bazel.remote.execution.v2.ContentAddressableStorage", "build.bazel.remote.execution.v2.Execution",
		"google.bytestream.ByteStream", "google.longrunning.Operations", "grpc.health.v1.Health",
	} {
		if !listed[service] {
			t.Errorf("%s is not listed", service)
		}
	}
}

// Row GEN-28: a call has the client's deadline, and one of the farm's besides.
func TestGEN_28_UnaryCallsAreBounded(t *testing.T) {
	h := start(t, faulty(func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{Stall: true} }),
		func(c *frontend.Config) {
			c.Limits.Unary, c.Limits.OperationWait = 200*time.Millisecond, 100*time.Millisecond
		})
	within(t, "a call without a deadline", func() {
		_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: protos(absent())})
		wantCode(t, "FindMissingBlobs", err, codes.DeadlineExceeded)
	})
	within(t, "a request that never comes", func() {
		stream, err := h.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs")
		if err != nil {
			t.Fatalf("NewStream: %v", err)
		}
		wantCode(t, "FindMissingBlobs", stream.RecvMsg(new(repb.FindMissingBlobsResponse)), codes.DeadlineExceeded)
	})
	eventually(t, "no handler left", func() bool { return handlers() == 0 })
}

// Row X-42: the connection survives a message that is too large.
func TestX_42_MessageTooLarge(t *testing.T) {
	h := start(t)
	_, err := h.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{{Data: make([]byte, 33<<20)}}})
	wantCode(t, "BatchUpdateBlobs", err, codes.ResourceExhausted)
	if _, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{}); err != nil {
		t.Errorf("FindMissingBlobs: %v", err)
	}
}

// Rows GEN-33, OPS-6 and X-165, audit row P23.
func TestGEN_33_OPS_6_WAIT_5_Drain(t *testing.T) {
	h := start(t)
	action := h.action(t)
	d := h.put(t, random(100))
	if err := h.server.Ready(t.Context()); err != nil {
		t.Errorf("Ready: %v", err)
	}
	open := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	op, _ := recv(t, open)
	upload := beginUpload(t, h.bytes, 100, 50)
	watch, err := healthpb.NewHealthClient(h.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatalf("Watch: %v", err)
	}
	if resp, err := watch.Recv(); err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("Watch = %v, %v, want SERVING", resp, err)
	}

	h.server.Drain()
	if resp, err := watch.Recv(); err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("Watch = %v, %v, want NOT_SERVING", resp, err)
	}
	if h.server.Ready(t.Context()) == nil {
		t.Error("Ready = nil while draining")
	}
	_, err = h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()}).Recv()
	wantCode(t, "Execute while draining", err, codes.Unavailable)
	_, err = h.wait(t, op.GetName()).Recv()
	wantCode(t, "WaitExecution while draining", err, codes.Unavailable)
	if _, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}); err != nil {
		t.Errorf("Read while draining: %v", err)
	}

	ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, errors.New("drain deadline"))
	defer cancel()
	begun := time.Now()
	within(t, "Shutdown", func() {
		if err := h.server.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
	if took := time.Since(begun); took < 300*time.Millisecond {
		t.Errorf("Shutdown took %v, want the drain to last while a stream is open", took)
	}
	for err = nil; err == nil; {
		_, err = open.Recv()
	}
	wantCode(t, "the open Execute", err, codes.Unavailable, "shutting down")
	if err := upload.RecvMsg(new(bytestream.WriteResponse)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the open upload: %v, want an error", err)
	}
	if n := handlers(); n != 0 {
		t.Errorf("%d handlers after Shutdown", n)
	}
	// The operation goes on elsewhere (row WAIT-5).
	if got, _ := recv(t, startOn(t, h.farm).wait(t, op.GetName())); got.GetName() != op.GetName() {
		t.Errorf("WaitExecution on another frontend = %v", got)
	}
}

// A drain without anything to wait for is short.
func TestShutdownWhenIdle(t *testing.T) {
	h := start(t)
	if _, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{}); err != nil {
		t.Fatalf("FindMissingBlobs: %v", err)
	}
	within(t, "Shutdown", func() {
		if err := h.server.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

func TestReadyTellsWhenTheBrokerIsGone(t *testing.T) {
	h := start(t)
	h.farm.Server.Stop()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Second, errors.New("too slow"))
	defer cancel()
	eventually(t, "Ready fails", func() bool { return h.server.Ready(ctx) != nil })
	_, err := h.ops.ListOperations(ctx, nil)
	if err == nil {
		t.Error("ListOperations works without a broker")
	}
}

func TestMetricsHaveNoLabelOfAClient(t *testing.T) {
	h := start(t)
	_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{InstanceName: "secret-instance", BlobDigests: protos(absent())})
	wantCode(t, "FindMissingBlobs", err, codes.OK)
	_, err = h.read(t.Context(), &bytestream.ReadRequest{ResourceName: "secret-instance/" + absent().Blob()})
	wantCode(t, "Read", err, codes.NotFound)
	err = h.conn.Invoke(t.Context(), "/secret.Service/Method", &repb.Digest{}, &repb.Digest{})
	wantCode(t, "a method that nobody has", err, codes.Unimplemented) // row X-159
	families, err := h.metrics.Gather()
	if err != nil {
		t.Fatalf("Gather: %v", err)
	}
	seen := map[string]bool{}
	for _, family := range families {
		seen[family.GetName()] = true
		if !strings.HasPrefix(family.GetName(), "jetfarm_frontend_") {
			t.Errorf("metric %s is not named jetfarm_frontend_*", family.GetName())
		}
		for _, metric := range family.GetMetric() {
			for _, label := range metric.GetLabel() {
				if strings.Contains(label.GetValue(), "secret") {
					t.Errorf("%s has the label %v", family.GetName(), label)
				}
			}
		}
	}
	for _, name := range []string{"jetfarm_frontend_rpc_duration_seconds", "jetfarm_frontend_waiting_streams"} {
		if !seen[name] {
			t.Errorf("no metric %s", name)
		}
	}
}

func TestLimitsValidate(t *testing.T) {
	if err := (frontend.Limits{}).Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	bad := frontend.Limits{MaxBatchBytes: 5 << 20, MaxDigests: 1 << 20, Stall: -1, ReadChunkBytes: 2 << 20, OperationWait: time.Hour}
	err := bad.Validate()
	if err == nil {
		t.Fatal("Validate = nil")
	}
	for _, text := range []string{"max batch bytes", "max digests", "stall", "read chunk bytes", "operation wait"} {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("Validate = %v, want all problems, also %q", err, text)
		}
	}
}
