package frontend

import (
	"context"
	"errors"
	"fmt"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/jetfarm/jetfarm/broker"
)

// operations serves google.longrunning.Operations.
type operations struct {
	longrunningpb.UnimplementedOperationsServer
	broker  *broker.Client
	answers *answers
	limits  Limits
}

// GetOperation returns the state of an operation.
func (o *operations) GetOperation(ctx context.Context, req *longrunningpb.GetOperationRequest) (*longrunningpb.Operation, error) {
	op, err := o.broker.Get(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	return o.answers.of(ctx, op, wants{})
}

// ListOperations returns one page of operations. The response of a done one has the status without
// the result, which GetOperation has.
func (o *operations) ListOperations(ctx context.Context, req *longrunningpb.ListOperationsRequest) (*longrunningpb.ListOperationsResponse, error) {
	if req.GetFilter() != "" {
		return nil, fmt.Errorf("%w: filter is not supported", errInvalid)
	}
	if req.GetReturnPartialSuccess() {
		return nil, fmt.Errorf("%w: return_partial_success", errUnimplemented)
	}
	size := int(req.GetPageSize())
	if size < 0 {
		return nil, fmt.Errorf("%w: page_size %d is negative", errInvalid, size)
	}
	if size == 0 || size > o.limits.MaxPageSize {
		size = o.limits.MaxPageSize
	}
	ops, next, err := o.broker.List(ctx, size, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	response := &longrunningpb.ListOperationsResponse{NextPageToken: next}
	for _, op := range ops {
		summary, err := o.summary(ctx, op)
		if err != nil {
			return nil, err
		}
		response.Operations = append(response.Operations, summary)
	}
	return response, nil
}

// summary is an operation without its result. A response that is a blob is not read for a listing.
func (o *operations) summary(ctx context.Context, op *broker.Operation) (*longrunningpb.Operation, error) {
	if !op.Done() {
		return message(op.Name, o.answers.metadata(op), nil)
	}
	short := &repb.ExecuteResponse{Message: "GetOperation returns the result"}
	if op.ResponseBlob.IsZero() {
		full, err := o.answers.response(ctx, op)
		if err != nil {
			return nil, err
		}
		short.Status, short.CachedResult = full.GetStatus(), full.GetCachedResult()
		if len(full.GetStatus().GetDetails()) > 0 {
			short.Status.Details = nil
		}
		if len(short.GetStatus().GetMessage()) > maxStatusText {
			short.Status.Message = clip(short.GetStatus().GetMessage())
		}
	}
	return message(op.Name, o.answers.metadata(op), short)
}

// CancelOperation ends an operation for whoever was given the name, and for all by the name in a listing; one
// that is done stays as it is (rows LRO-3, X-111).
func (o *operations) CancelOperation(ctx context.Context, req *longrunningpb.CancelOperationRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, o.broker.Cancel(ctx, req.GetName())
}

// DeleteOperation forgets an operation without cancelling it.
func (o *operations) DeleteOperation(ctx context.Context, req *longrunningpb.DeleteOperationRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, o.broker.Delete(ctx, req.GetName())
}

// errWaited ends the wait of WaitOperation.
var errWaited = errors.New("waited long enough")

// WaitOperation returns the operation when it is done, or its latest state after the timeout.
func (o *operations) WaitOperation(ctx context.Context, req *longrunningpb.WaitOperationRequest) (*longrunningpb.Operation, error) {
	bound := o.limits.OperationWait
	if timeout := req.GetTimeout(); timeout != nil {
		if timeout.CheckValid() != nil || timeout.AsDuration() < 0 {
			return nil, fmt.Errorf("%w: timeout %s", errInvalid, durationText(timeout))
		}
		bound = min(bound, timeout.AsDuration())
	}
	waiting, cancel := context.WithTimeoutCause(ctx, bound, errWaited)
	defer cancel()
	for op, err := range o.broker.Watch(waiting, req.GetName()) {
		if err == nil && !op.Done() {
			continue
		}
		if err != nil && (ctx.Err() != nil || waiting.Err() == nil) {
			return nil, err
		}
		break
	}
	op, err := o.broker.Get(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	return o.answers.of(ctx, op, wants{})
}
