package frontend

import (
	"context"
	"errors"
	"fmt"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// answers makes the Operation messages that clients see. Operation.error is never set (row EXA-3).
type answers struct {
	broker *broker.Client
	blobs  cas.Store
	inline *inliner
	limits Limits
}

// of returns the message for a broker's operation, with its response when it is done. The error wraps
// errNotFound when the response was a blob that is gone.
func (a *answers) of(ctx context.Context, op *broker.Operation, want wants) (*longrunningpb.Operation, error) {
	meta := a.metadata(op)
	if !op.Done() {
		return message(op.WaiterName(), meta, nil)
	}
	response, err := a.response(ctx, op)
	if err != nil {
		return nil, err
	}
	if err := a.inline.apply(ctx, op.Action.Space(), response.GetResult(), want); err != nil {
		return nil, err
	}
	return a.bounded(op.WaiterName(), meta, response)
}

// response reads the ExecuteResponse of a done operation.
func (a *answers) response(ctx context.Context, op *broker.Operation) (*repb.ExecuteResponse, error) {
	b := op.Response
	if !op.ResponseBlob.IsZero() {
		var err error
		b, err = readBlob(ctx, a.blobs, op.ResponseBlob, int64(a.limits.MaxReceiveBytes))
		if errors.Is(err, cas.ErrNotFound) || errors.Is(err, errDamaged) {
			// The client's way on is to execute again, which NOT_FOUND on a wait tells it to do.
			return nil, fmt.Errorf("%w: the response of operation %s is no longer stored", errNotFound, op.Name)
		}
		if err != nil {
			return nil, err
		}
	}
	response := new(repb.ExecuteResponse)
	if err := proto.Unmarshal(b, response); err != nil {
		return nil, fmt.Errorf("response of operation %s: %w", op.Name, err)
	}
	return response, nil
}

// finished returns the done message for an answer that no operation of the broker stands behind.
func (a *answers) finished(name string, action digest.Digest, response *repb.ExecuteResponse) (*longrunningpb.Operation, error) {
	meta := &repb.ExecuteOperationMetadata{
		Stage:          repb.ExecutionStage_COMPLETED,
		ActionDigest:   action.Proto(),
		DigestFunction: action.Space().Function().Proto(),
	}
	return a.bounded(name, meta, response)
}

// bounded replaces a response that no client would receive (row EXO-34).
func (a *answers) bounded(name string, meta *repb.ExecuteOperationMetadata, response *repb.ExecuteResponse) (*longrunningpb.Operation, error) {
	const around = 4 << 10 // name, metadata and type names
	if n := proto.Size(response); n > a.limits.MaxResponseBytes-around {
		err := fmt.Errorf("%w: it has %d bytes, clients receive %d; let the action produce output directories in place of single files",
			errOversized, n, a.limits.MaxResponseBytes)
		response = &repb.ExecuteResponse{Status: statusOf(err, 0).Proto()}
	}
	return message(name, meta, response)
}

func message(name string, meta *repb.ExecuteOperationMetadata, response *repb.ExecuteResponse) (*longrunningpb.Operation, error) {
	packed, err := anypb.New(meta)
	if err != nil {
		return nil, fmt.Errorf("metadata of operation %s: %w", name, err)
	}
	op := &longrunningpb.Operation{Name: name, Metadata: packed}
	if response == nil {
		return op, nil
	}
	if packed, err = anypb.New(response); err != nil {
		return nil, fmt.Errorf("response of operation %s: %w", name, err)
	}
	op.Done = true
	op.Result = &longrunningpb.Operation_Response{Response: packed}
	return op, nil
}

// metadata says where an operation is. Why one waits is a LocalizedMessage in the auxiliary metadata, the only
// place that the API has for it.
func (a *answers) metadata(op *broker.Operation) *repb.ExecuteOperationMetadata {
	meta := &repb.ExecuteOperationMetadata{
		Stage:          op.Stage,
		ActionDigest:   op.Action.Proto(),
		DigestFunction: op.Action.Space().Function().Proto(),
		PartialExecutionMetadata: &repb.ExecutedActionMetadata{
			Worker:          op.Worker,
			QueuedTimestamp: timestamppb.New(op.Queued),
		},
	}
	meta.StdoutStreamName, meta.StderrStreamName = logNames(op)
	if why := a.broker.Explain(op); why != "" {
		if packed, err := anypb.New(&errdetails.LocalizedMessage{Locale: "en", Message: clip(why)}); err == nil {
			meta.PartialExecutionMetadata.AuxiliaryMetadata = []*anypb.Any{packed}
		}
	}
	return meta
}
