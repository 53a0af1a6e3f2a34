package frontend

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	rpcpb "google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// What a request can do wrong, as errors that status turns into codes. The text that wraps one names
// the value that was wrong.
var (
	errInvalid       = errors.New("invalid argument")
	errRange         = errors.New("out of range")
	errDenied        = errors.New("permission denied")
	errDisabled      = errors.New("disabled")
	errTooLarge      = errors.New("too large")
	errOversized     = errors.New("result is too large")
	errUnimplemented = errors.New("not implemented")
	// errNotFound is an operation or a result that is not there.
	errNotFound = errors.New("not found")
	// errDamaged is a stored blob whose bytes are not those of its digest.
	errDamaged = errors.New("stored blob is damaged")
	// errBusy is a frontend that has as many streams of a kind as it takes.
	errBusy = errors.New("frontend is busy")
	// errRate is a frontend that is asked to execute more often than it takes.
	errRate = errors.New("too many executions per second")
	// errMoved is an upload that begins before what is kept of it.
	errMoved = errors.New("more of the upload has arrived")
	// errDraining ends what a client may begin again on another frontend.
	errDraining = errors.New("frontend is shutting down")
	// errInterrupted ends a stream whose operation could not be followed to its end.
	errInterrupted = errors.New("operation stream interrupted")
	// errStalled ends a stream whose client neither sends nor receives.
	errStalled = errors.New("client stalled")
	// errSlow ends a unary call that took longer than Limits.Unary.
	errSlow = errors.New("call took too long")
	// errPanic is a handler that panicked.
	errPanic = errors.New("handler panicked")
)

// sentinelCodes is the code of every sentinel that can reach a client, first match first. Transient ones
// carry a RetryInfo: Bazel repeats whatever has one (row GEN-1).
var sentinelCodes = []sentinelCode{ //nolint:gochecknoglobals // a table that nothing changes
	{errDamaged, codes.DataLoss, false},
	{errInvalid, codes.InvalidArgument, false},
	{digest.ErrInvalid, codes.InvalidArgument, false},
	{broker.ErrInvalid, codes.InvalidArgument, false},
	{actioncache.ErrInvalid, codes.InvalidArgument, false},
	{actioncache.ErrTooLarge, codes.InvalidArgument, false},
	{cas.ErrMismatch, codes.InvalidArgument, false},
	{compress.ErrInvalid, codes.InvalidArgument, false},
	{compress.ErrTooLarge, codes.InvalidArgument, false},
	{errRange, codes.OutOfRange, false},
	{errDenied, codes.PermissionDenied, false},
	{errDisabled, codes.FailedPrecondition, false},
	{errOversized, codes.FailedPrecondition, false},
	{errUnimplemented, codes.Unimplemented, false},
	{errTooLarge, codes.ResourceExhausted, false},
	{errStalled, codes.DeadlineExceeded, false},
	{errSlow, codes.DeadlineExceeded, false},
	{errBusy, codes.ResourceExhausted, true},
	{errRate, codes.ResourceExhausted, true},
	{errMoved, codes.Aborted, true},
	{errDraining, codes.Unavailable, true},
	{errInterrupted, codes.Unavailable, true},
	{cas.ErrUnavailable, codes.Unavailable, true},
	{broker.ErrUnavailable, codes.Unavailable, true},
	{broker.ErrQueueFull, codes.ResourceExhausted, true},
	{broker.ErrTooManyPools, codes.ResourceExhausted, true},
	{broker.ErrTooManyCancels, codes.ResourceExhausted, false},
	{errDownloads, codes.ResourceExhausted, true},
	{cas.ErrFull, codes.ResourceExhausted, false},
	{cas.ErrNotKept, codes.InvalidArgument, false},
	{broker.ErrNoWorker, codes.FailedPrecondition, false},
	{broker.ErrCancelled, codes.Canceled, false},
	{broker.ErrLost, codes.Unavailable, true},
	{errNotFound, codes.NotFound, false},
	{cas.ErrNotFound, codes.NotFound, false},
	{broker.ErrNotFound, codes.NotFound, false},
	{actioncache.ErrNotFound, codes.NotFound, false},
	{context.Canceled, codes.Canceled, false},
	{context.DeadlineExceeded, codes.DeadlineExceeded, false},
}

// sentinelCode is a row of sentinelCodes.
type sentinelCode struct {
	sentinel  error
	code      codes.Code
	transient bool
}

// missingError reports blobs that a request needs and that are not in the CAS.
type missingError struct{ missing []digest.Digest }

func (e *missingError) Error() string {
	return fmt.Sprintf("%d blobs are not in the CAS, the first is %v", len(e.missing), e.missing[0])
}

// statusOf is the one place where errors become gRPC statuses, for the end of a call, for one blob of
// a batch and for an ExecuteResponse alike; violations bounds the MISSING details. An error that no row
// above knows is INTERNAL without its text, which is for the log.
func statusOf(err error, violations int) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	if missing := missingOf(err); missing != nil {
		return missingStatus(err, missing, violations)
	}
	if unsupported, ok := errors.AsType[*unsupportedError](err); ok {
		return unsupportedStatus(unsupported)
	}
	for _, row := range sentinelCodes {
		if !errors.Is(err, row.sentinel) {
			continue
		}
		s := status.New(row.code, clip(err.Error()))
		if row.transient {
			s = withDetails(s, &rpcpb.RetryInfo{RetryDelay: durationpb.New(retryAfter)})
		}
		return s
	}
	// The library's own errors of a stream: a message too large, not decodable, a closed connection.
	if s, ok := status.FromError(err); ok {
		return status.New(s.Code(), clip(s.Message()))
	}
	return status.New(codes.Internal, "internal error")
}

// endOf returns why a call ended that returned err: the end of its context goes before whatever error
// that led to.
func endOf(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// missingOf returns the blobs that err reports as missing, or nil. A result of the action cache that
// is not found because its blobs are missing asks nobody to upload them.
func missingOf(err error) []digest.Digest {
	if errors.Is(err, actioncache.ErrNotFound) {
		return nil
	}
	if ours, ok := errors.AsType[*missingError](err); ok {
		return ours.missing
	}
	if cached, ok := errors.AsType[*actioncache.MissingError](err); ok {
		return cached.Missing
	}
	return nil
}

// missingStatus is FAILED_PRECONDITION with exactly one PreconditionFailure whose violations are all
// MISSING: the only form after which every client uploads the blobs again (rows EXA-6 to EXA-10).
func missingStatus(err error, missing []digest.Digest, most int) *status.Status {
	failure := &rpcpb.PreconditionFailure{}
	for _, d := range missing[:min(len(missing), most)] {
		failure.Violations = append(failure.Violations, &rpcpb.PreconditionFailure_Violation{Type: "MISSING", Subject: d.Blob()})
	}
	return withDetails(status.New(codes.FailedPrecondition, clip(err.Error())), failure)
}

// unsupportedStatus names every qualifier that is not supported (row AST-2).
func unsupportedStatus(err *unsupportedError) *status.Status {
	request := &rpcpb.BadRequest{}
	for _, name := range err.names[:min(len(err.names), maxTrailerViolations)] {
		request.FieldViolations = append(request.FieldViolations, &rpcpb.BadRequest_FieldViolation{
			Field: "qualifiers.name", Description: clip(strconv.Quote(name) + " not supported"),
		})
	}
	return withDetails(status.New(codes.InvalidArgument, clip(err.Error())), request)
}

func withDetails(s *status.Status, detail protoadapt.MessageV1) *status.Status {
	detailed, err := s.WithDetails(detail)
	if err != nil {
		return s
	}
	return detailed
}

// clip makes text valid UTF-8 of at most maxStatusText bytes (rows GEN-29, GEN-30).
func clip(text string) string {
	if len(text) > maxStatusText {
		text = text[:maxStatusText] + "..."
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}

// durationText is for error texts; it never shows more than a client sent.
func durationText(d *durationpb.Duration) string {
	if d.CheckValid() != nil {
		return fmt.Sprintf("%ds%dns", d.GetSeconds(), d.GetNanos())
	}
	return d.AsDuration().Round(time.Millisecond).String()
}
