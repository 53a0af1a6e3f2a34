package worker

import (
	"context"
	"errors"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker/contain"
	"github.com/jetfarm/jetfarm/worker/inputs"
	"github.com/jetfarm/jetfarm/worker/outputs"
	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// timeoutMessage is compared by clients (decision D8).
const timeoutMessage = "execution timeout exceeded"

// maxResponse keeps a response below the 4 MiB that clients receive in one message.
const maxResponse = 4<<20 - 64<<10

func failure(c code.Code, message string) *repb.ExecuteResponse {
	return &repb.ExecuteResponse{Status: &status.Status{Code: int32(c), Message: message}}
}

// blame returns the response for an error that is the client's to mend, or nil for any other error.
func blame(err error) *repb.ExecuteResponse {
	var missing *inputs.MissingError
	var spawn *sandbox.SpawnError
	switch {
	case errors.As(err, &missing):
		return missingResponse(missing)
	case errors.As(err, &spawn), errors.Is(err, errInvalid), errors.Is(err, inputs.ErrInvalid), errors.Is(err, outputs.ErrInvalid):
		return failure(code.Code_INVALID_ARGUMENT, err.Error())
	case errors.Is(err, outputs.ErrRefused):
		return failure(code.Code_FAILED_PRECONDITION, err.Error())
	}
	return nil
}

// missingResponse has exactly one detail with a violation for every blob (rows EXA-6 to EXA-11).
func missingResponse(missing *inputs.MissingError) *repb.ExecuteResponse {
	violations := make([]*errdetails.PreconditionFailure_Violation, len(missing.Missing))
	for i, d := range missing.Missing {
		violations[i] = &errdetails.PreconditionFailure_Violation{Type: "MISSING", Subject: d.Blob()}
	}
	r := failure(code.Code_FAILED_PRECONDITION, missing.Error())
	detail, err := anypb.New(&errdetails.PreconditionFailure{Violations: violations})
	if err != nil {
		return failure(code.Code_INTERNAL, "missing inputs can't be listed")
	}
	r.Status.Details = []*anypb.Any{detail}
	return r
}

// reason says in a few words that a user may read why the farm failed.
func reason(err error) string {
	switch {
	case errors.Is(err, errDraining):
		return errDraining.Error()
	case isDiskFull(err):
		return "the worker's disk is full"
	case isOutage(err):
		return "the storage does not answer"
	case errors.Is(err, cas.ErrFull):
		return "the storage is full"
	case errors.Is(err, errFetchTimeout), errors.Is(err, errUploadTimeout):
		return err.Error()
	case errors.Is(err, errSetUp):
		return "actions can't be set up"
	case errors.Is(err, contain.ErrPanic):
		return "internal error (panic)"
	}
	return "internal error"
}

// outcome serializes a response. One that is too large for a message is stored as a blob, one that is
// too large for clients is replaced by an error that says so (row EXO-34).
func (w *Worker) outcome(ctx context.Context, space digest.Space, r *repb.ExecuteResponse) (broker.Outcome, error) {
	data, err := proto.Marshal(r)
	if err == nil && len(data) > maxResponse {
		data, err = proto.Marshal(failure(code.Code_FAILED_PRECONDITION, fmt.Sprintf(
			"the result has %d bytes, at most %d can be delivered: use output directories instead of many output files", len(data), maxResponse)))
	}
	if err != nil {
		return broker.Outcome{}, fmt.Errorf("serialize the response: %w", err)
	}
	if len(data) <= broker.MaxResponse {
		return broker.Outcome{Response: data}, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, w.cfg.UploadTimeout, errUploadTimeout)
	defer cancel()
	d, err := cas.PutBytes(ctx, w.cfg.Blobs, space, data)
	return broker.Outcome{ResponseBlob: d}, err
}
