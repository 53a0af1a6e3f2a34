package frontend_test

import (
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/jetfarm/jetfarm/broker"
)

func TestLRO_UnknownNames(t *testing.T) {
	h := start(t)
	for _, unknown := range []string{"", "nope", ">", "a.b.c", "AAAAAAAAAAAAAAAAAAAAAAAAAA"} {
		_, err := h.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: unknown})
		wantCode(t, "LRO-1 X-107 Get "+unknown, err, codes.NotFound)
		_, err = h.ops.CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: unknown})
		wantCode(t, "LRO-3 Cancel "+unknown, err, codes.NotFound)
		_, err = h.ops.DeleteOperation(t.Context(), &longrunningpb.DeleteOperationRequest{Name: unknown})
		wantCode(t, "LRO-4 Delete "+unknown, err, codes.NotFound)
		_, err = h.ops.WaitOperation(t.Context(), &longrunningpb.WaitOperationRequest{Name: unknown})
		wantCode(t, "LRO-5 Wait "+unknown, err, codes.NotFound)
	}
}

func TestLRO_1_LRO_3_LRO_5_Operations(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	action := h.action(t)
	stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	op, _ := recv(t, stream)

	got, err := h.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: op.GetName()})
	if err != nil || got.GetDone() || metadataOf(t, got).GetStage() != repb.ExecutionStage_QUEUED {
		t.Errorf("GetOperation = %v, %v, want it queued", got, err)
	}
	within(t, "LRO-5 a wait with a timeout", func() {
		begin := time.Now()
		got, err = h.ops.WaitOperation(t.Context(), &longrunningpb.WaitOperationRequest{Name: op.GetName(), Timeout: durationpb.New(300 * time.Millisecond)})
		if err != nil || got.GetDone() || time.Since(begin) < 300*time.Millisecond {
			t.Errorf("WaitOperation = %v, %v after %v, want the latest state after 300 ms", got, err, time.Since(begin))
		}
	})
	_, err = h.ops.WaitOperation(t.Context(), &longrunningpb.WaitOperationRequest{Name: op.GetName(), Timeout: durationpb.New(-1)})
	wantCode(t, "a negative timeout", err, codes.InvalidArgument)

	lease := begin(t, q)
	done := make(chan *longrunningpb.Operation, 1)
	go func() {
		got, err := h.ops.WaitOperation(t.Context(), &longrunningpb.WaitOperationRequest{Name: op.GetName()})
		if err != nil {
			t.Errorf("WaitOperation: %v", err)
		}
		done <- got
	}()
	settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 4}})
	if got := <-done; !got.GetDone() || responseOf(t, got).GetResult().GetExitCode() != 4 {
		t.Errorf("WaitOperation = %v, want the end", got)
	}
	finish(t, stream, action)
	// Row LRO-3: cancelling what is done changes nothing.
	if _, err := h.ops.CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: op.GetName()}); err != nil {
		t.Errorf("CancelOperation of a done operation: %v", err)
	}
	got, err = h.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: op.GetName()})
	if err != nil || responseOf(t, got).GetResult().GetExitCode() != 4 {
		t.Errorf("GetOperation = %v, %v", got, err)
	}
	if _, err := h.ops.DeleteOperation(t.Context(), &longrunningpb.DeleteOperationRequest{Name: op.GetName()}); err != nil {
		t.Errorf("DeleteOperation: %v", err)
	}
	_, err = h.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: op.GetName()})
	wantCode(t, "LRO-4 GetOperation of a deleted one", err, codes.NotFound)
}

func TestLRO_2_X_112_List(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	names := map[string]bool{}
	for range 6 {
		op, _ := recv(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()}))
		names[broker.OperationOf(op.GetName())] = false // once, however many wait for it
	}
	twice := h.action(t)
	for range 2 {
		op, _ := recv(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: twice.Proto()}))
		names[broker.OperationOf(op.GetName())] = false
	}
	settle(t, begin(t, q), &repb.ExecuteResponse{Result: h.result(t), Message: "m"})
	token, pages, done := "", 0, 0
	for {
		resp, err := h.ops.ListOperations(t.Context(), &longrunningpb.ListOperationsRequest{Name: "operations", PageSize: 3, PageToken: token})
		if err != nil || len(resp.GetOperations()) > 3 {
			t.Fatalf("ListOperations = %d operations, %v", len(resp.GetOperations()), err)
		}
		for _, op := range resp.GetOperations() {
			if seen, known := names[op.GetName()]; seen || !known {
				t.Errorf("%s is listed twice, or unknown", op.GetName())
			}
			names[op.GetName()] = true
			metadataOf(t, op)
			if op.GetDone() {
				done++
				if responseOf(t, op).GetResult() != nil {
					t.Error("a listing has results")
				}
			}
		}
		pages++
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	if pages != 3 || done != 1 {
		t.Errorf("%d pages and %d done, want 3 and 1", pages, done)
	}
	for name, seen := range names {
		if !seen {
			t.Errorf("%s is not listed", name)
		}
	}
	for row, test := range map[string]struct {
		req  *longrunningpb.ListOperationsRequest
		code codes.Code
	}{
		"token":                  {&longrunningpb.ListOperationsRequest{PageToken: "x"}, codes.InvalidArgument},
		"page_size":              {&longrunningpb.ListOperationsRequest{PageSize: -1}, codes.InvalidArgument},
		"filter":                 {&longrunningpb.ListOperationsRequest{Filter: "done=true"}, codes.InvalidArgument},
		"return_partial_success": {&longrunningpb.ListOperationsRequest{ReturnPartialSuccess: true}, codes.Unimplemented},
	} {
		_, err := h.ops.ListOperations(t.Context(), test.req)
		wantCode(t, row, err, test.code)
	}
	if _, err := h.ops.ListOperations(t.Context(), &longrunningpb.ListOperationsRequest{PageSize: 1 << 30}); err != nil { // row X-112
		t.Errorf("a huge page: %v", err)
	}
}
