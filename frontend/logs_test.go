package frontend_test

import (
	"context"
	"errors"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/frontend"
)

// There are as many readers of logs as a frontend takes. One that leaves, or whose frontend is
// shut down, is gone.
func TestReadersOfLogsAreBounded(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.MaxLogReaders = 1 })
	q := h.queue(t)
	action := h.action(t)
	execution := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	lease := begin(t, q)
	op := await(t, execution, repb.ExecutionStage_EXECUTING)
	name := metadataOf(t, op).GetStdoutStreamName()
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	first, err := h.bytes.Read(ctx, &bytestream.ReadRequest{ResourceName: name})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first reader", func() bool { return handlers() >= 2 })
	eventually(t, "the second reader is told to come again", func() bool {
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err = h.read(short, &bytestream.ReadRequest{ResourceName: name})
		return status.Code(err) == codes.ResourceExhausted
	})
	wantCode(t, "the second reader", err, codes.ResourceExhausted, "readers of logs")
	if _, ok := status.Convert(err).Details()[0].(*errdetails.RetryInfo); !ok {
		t.Errorf("details %v, want RetryInfo", status.Convert(err).Details())
	}
	leave()
	if _, err := first.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("the reader that left: %v", err)
	}
	settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{}})
	finish(t, execution, action)
	eventually(t, "room for another reader", func() bool {
		_, err = h.read(t.Context(), &bytestream.ReadRequest{ResourceName: name})
		return status.Code(err) == codes.NotFound // nothing was written
	})
	wantCode(t, "the log of an action that has none", err, codes.NotFound, "not kept")

	// Draining.
	execution = h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()})
	begin(t, q)
	op = await(t, execution, repb.ExecutionStage_EXECUTING)
	open, err := h.bytes.Read(t.Context(), &bytestream.ReadRequest{ResourceName: metadataOf(t, op).GetStderrStreamName()})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the reader", func() bool { return handlers() >= 2 })
	over, end := context.WithCancelCause(t.Context())
	end(errors.New("no time to drain"))
	if err := h.server.Shutdown(over); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	_, err = open.Recv()
	wantCode(t, "the open reader", err, codes.Unavailable)
	if n := handlers(); n != 0 {
		t.Errorf("%d handlers after Shutdown", n)
	}
}

// Row GEN-2: a log belongs to the instance of its operation.
func TestLogsOfInstancesThatAreNotServed(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Instances = frontend.Instances{"main"} })
	for _, name := range []string{"operations/AAAAAAAAAAAAAAAAAAAAAAAAAA/logstreams/stdout", "other/operations/AAAAAAAAAAAAAAAAAAAAAAAAAA/logstreams/stdout"} {
		_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: name})
		wantCode(t, name, err, codes.InvalidArgument, "not served")
	}
	_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: "main/operations/AAAAAAAAAAAAAAAAAAAAAAAAAA/logstreams/stdout"})
	wantCode(t, "an unknown operation", err, codes.NotFound)
}
