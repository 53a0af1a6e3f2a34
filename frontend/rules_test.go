package frontend_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

func TestRetryInfo(t *testing.T) {
	h := start(t, faulty(func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{Err: cas.ErrUnavailable} }))
	retries := func(err error) bool {
		for _, detail := range status.Convert(err).Details() {
			if _, ok := detail.(*errdetails.RetryInfo); ok {
				return true
			}
		}
		return false
	}
	t.Run("GEN-1 with a transient error", func(t *testing.T) {
		_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: protos(absent())})
		if wantCode(t, "FindMissingBlobs", err, codes.Unavailable); !retries(err) {
			t.Errorf("FindMissingBlobs: %v, want a RetryInfo", status.Convert(err).Details())
		}
	})
	t.Run("GEN-1 never with the client's own error", func(t *testing.T) {
		_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{nil}})
		if wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument); retries(err) {
			t.Errorf("FindMissingBlobs: %v, want no RetryInfo", status.Convert(err).Details())
		}
	})
}

func TestEmptyBlobOfAFreshFarm(t *testing.T) {
	h := start(t)
	t.Run("GEN-20 is never missing", func(t *testing.T) {
		if h.missing(t, emptyDigest) {
			t.Error("the empty blob is missing")
		}
	})
	t.Run("GEN-20 is read", func(t *testing.T) {
		if b, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: emptyDigest.String()}); err != nil || len(b) != 0 {
			t.Errorf("Read = %d bytes, %v", len(b), err)
		}
	})
	t.Run("GEN-20 BRB-13 is read in a batch", func(t *testing.T) {
		resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(emptyDigest)})
		if err != nil || len(resp.GetResponses()) != 1 || resp.GetResponses()[0].GetStatus().GetCode() != 0 {
			t.Errorf("BatchReadBlobs = %v, %v", resp, err)
		}
	})
}

// Calls without anything in them.
func TestEmptyRequests(t *testing.T) {
	h := start(t, allowUpdates)
	for call, do := range map[string]func(ctx context.Context) error{
		"BatchRead of a nil digest": func(ctx context.Context) error {
			resp, err := h.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{nil}})
			if err == nil {
				err = status.ErrorProto(resp.GetResponses()[0].GetStatus())
			}
			return err
		},
		"BatchUpdate of a nil digest": func(ctx context.Context) error {
			resp, err := h.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{Requests: []*repb.BatchUpdateBlobsRequest_Request{{}}})
			if err == nil {
				err = status.ErrorProto(resp.GetResponses()[0].GetStatus())
			}
			return err
		},
		"GetTree": func(ctx context.Context) error {
			_, err := h.tree(ctx, &repb.GetTreeRequest{})
			return err
		},
		"GetActionResult": func(ctx context.Context) error {
			_, err := h.ac.GetActionResult(ctx, &repb.GetActionResultRequest{})
			return err
		},
		"UpdateActionResult": func(ctx context.Context) error {
			_, err := h.ac.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{})
			return err
		},
		"Execute": func(ctx context.Context) error {
			_, err := h.execute(ctx, t, &repb.ExecuteRequest{}).Recv()
			return err
		},
		"Read": func(ctx context.Context) error {
			_, err := h.read(ctx, &bytestream.ReadRequest{})
			return err
		},
		"Write": func(ctx context.Context) error {
			_, err := h.write(ctx, &bytestream.WriteRequest{})
			return err
		},
		"QueryWriteStatus": func(ctx context.Context) error {
			_, err := h.bytes.QueryWriteStatus(ctx, &bytestream.QueryWriteStatusRequest{})
			return err
		},
	} {
		t.Run("X-7 GEN-11 "+call, func(t *testing.T) { wantCode(t, call, do(t.Context()), codes.InvalidArgument) })
	}
	t.Run("X-7 FMB-4 FindMissingBlobs of nothing", func(t *testing.T) {
		if _, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{}); err != nil {
			t.Errorf("FindMissingBlobs: %v", err)
		}
	})
	t.Run("X-7 nothing panicked", func(t *testing.T) {
		_, err := h.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{})
		if status.Code(err) == codes.Internal || h.metric(t, "jetfarm_frontend_panics_total") != 0 {
			t.Errorf("GetOperation: %v, or another call panicked", err)
		}
	})
}

// What is wrong is in the text, and the text is bounded.
func TestErrorTexts(t *testing.T) {
	h := start(t, allowUpdates)
	action, result := h.action(t), h.result(t)
	result.OutputFiles[0].Path = "/etc/passwd"
	find := func(instance string, ds ...*repb.Digest) error {
		_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{InstanceName: instance, BlobDigests: ds})
		return err
	}
	_, badPath := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: result})
	_, badOffset := h.write(t.Context(), &bytestream.WriteRequest{ResourceName: uploadName(absent()), WriteOffset: 4711})
	_, badName := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: "blobs/xyz/7"})
	for what, test := range map[string]struct {
		err  error
		text string
	}{
		"GEN-29 a digest":        {find("", &repb.Digest{Hash: "xyz", SizeBytes: 7}), "xyz"},
		"GEN-29 its place":       {find("", absent().Proto(), &repb.Digest{Hash: "xyz", SizeBytes: 7}), "blob_digests[1]"},
		"GEN-29 a size":          {find("", &repb.Digest{Hash: absent().Hash(), SizeBytes: -42}), "-42"},
		"GEN-29 an instance":     {find("a//b", nil), "a//b"},
		"GEN-29 a path":          {badPath, "/etc/passwd"},
		"GEN-29 an offset":       {badOffset, "4711"},
		"GEN-29 a resource name": {badName, "blobs/xyz/7"},
	} {
		t.Run(what, func(t *testing.T) { wantCode(t, what, test.err, codes.InvalidArgument, test.text) })
	}
	t.Run("GEN-30 X-13 ten megabytes of instance name", func(t *testing.T) {
		err := find(strings.Repeat("ä", 5<<20), nil)
		wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument)
		if n := proto.Size(status.Convert(err).Proto()); n > 8<<10 || !utf8.ValidString(err.Error()) {
			t.Errorf("a status of %d bytes, valid UTF-8: %v", n, utf8.ValidString(err.Error()))
		}
	})
	t.Run("X-15 a megabyte of resource name", func(t *testing.T) {
		for _, resource := range []string{strings.Repeat("x", 1<<20), strings.Repeat("x/", 100_000) + "blobs/" + absent().Hash() + "/1"} {
			_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: resource})
			wantCode(t, "Read", err, codes.InvalidArgument)
			_, err = h.write(t.Context(), &bytestream.WriteRequest{ResourceName: resource})
			wantCode(t, "Write", err, codes.InvalidArgument)
		}
	})
}

// What a client says about itself.
func TestRequestMetadata(t *testing.T) {
	var mu sync.Mutex
	var log bytes.Buffer
	h := start(t, func(c *frontend.Config) {
		c.Log = slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return log.Write(p)
		}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	const header = "build.bazel.remote.execution.v2.requestmetadata-bin"
	find := func(ctx context.Context) error {
		_, err := h.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{nil}})
		return err
	}
	id := "a\nlevel=ERROR msg=forged\x1b[31m<b>"
	encoded := encode(&repb.RequestMetadata{ToolInvocationId: id})
	t.Run("X-18 control characters in the invocation id", func(t *testing.T) {
		wantCode(t, "FindMissingBlobs", find(metadata.AppendToOutgoingContext(t.Context(), header, string(encoded))), codes.InvalidArgument)
		mu.Lock()
		defer mu.Unlock()
		if text := log.String(); !strings.Contains(text, "forged") || strings.Contains(text, "\nlevel=ERROR msg=forged") || strings.Contains(text, "\x1b") {
			t.Errorf("the log is not escaped, or does not name the invocation: %q", text)
		}
	})
	t.Run("X-17 GEN-24 given twice, and garbage", func(t *testing.T) {
		ctx := metadata.AppendToOutgoingContext(t.Context(), header, "\xff\xff", header, string(encoded))
		wantCode(t, "FindMissingBlobs", find(ctx), codes.InvalidArgument)
	})
	t.Run("X-17 X-158 larger than headers may be", func(t *testing.T) {
		err := find(metadata.AppendToOutgoingContext(t.Context(), header, strings.Repeat("x", 100<<10)))
		if err == nil || status.Code(err) == codes.InvalidArgument {
			t.Errorf("FindMissingBlobs: %v, want the library's refusal", err)
		}
		wantCode(t, "the next call", find(t.Context()), codes.InvalidArgument)
	})
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestStorageThatHangs(t *testing.T) {
	h := start(t, faulty(func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{After: -1, Stall: true} }))
	t.Run("CAP-20 capabilities do not wait for it", func(t *testing.T) {
		within(t, "GetCapabilities", func() {
			if _, err := h.caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{}); err != nil {
				t.Errorf("GetCapabilities: %v", err)
			}
		})
	})
	for call, do := range h.callsOf("") {
		if call == "GetCapabilities" || call == "Execute" || strings.HasSuffix(call, "ActionResult") || call == "BatchUpdateBlobs" {
			continue // They need no blob to answer this request, or have tests of their own.
		}
		t.Run("GEN-28 "+call+" ends with its client's deadline", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			wantCode(t, call, do(ctx), codes.DeadlineExceeded)
			eventually(t, "no handler left", func() bool { return handlers() == 0 })
		})
	}
	t.Run("X-90 GetTree ends with its client", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := h.cas.GetTree(ctx, &repb.GetTreeRequest{RootDigest: absent().Proto()})
		if err != nil {
			t.Fatalf("GetTree: %v", err)
		}
		eventually(t, "the call is served", func() bool { return handlers() > 0 })
		cancel()
		if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
			t.Errorf("GetTree: %v", err)
		}
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
}

// The storage being down is no verdict on the action.
func TestExecuteStoreIsDown(t *testing.T) {
	h := start(t, faulty(func(op castest.Op, _ digest.Digest) castest.Fault {
		if op == castest.OpOpen {
			return castest.Fault{After: -1, Err: cas.ErrUnavailable}
		}
		return castest.Fault{}
	}))
	_, err := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: absent().Proto()}).Recv()
	wantCode(t, "Execute", err, codes.Unavailable)
}
