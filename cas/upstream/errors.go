package upstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas"
)

// The errors of a Client beside those of package cas, whose ErrUnavailable they all are.
var (
	// ErrDown reports an upstream that was found not to answer and is not asked until it does.
	ErrDown = fmt.Errorf("%w: the upstream cache is down", cas.ErrUnavailable)
	// ErrRefused reports an upstream that answers and does not do what it was asked: it lacks the digest
	// function, takes no blobs that large, forbids the call or does not know the instance.
	ErrRefused = fmt.Errorf("%w: the upstream cache refuses", cas.ErrUnavailable)

	errFunction = fmt.Errorf("%w: it does not have the digest function", ErrRefused)
	// errForbidden is a refusal that repeating will not change.
	errForbidden = fmt.Errorf("%w what it was asked for", ErrRefused)

	errStalled = fmt.Errorf("%w: the upstream cache has stalled", cas.ErrUnavailable)
	errClosed  = errors.New("the transfer was ended by this side")
)

// failure returns the error of a call under ctx that was made under bound: the cause of ctx if that
// has ended, else one of package cas.
func failure(ctx, bound context.Context, err error) error {
	if err == nil {
		return nil
	}
	code := status.Code(err)
	if code == codes.DeadlineExceeded {
		expire(ctx)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if bound.Err() != nil {
		return context.Cause(bound)
	}
	return ofStatus(code, status.Convert(err).Message())
}

// expire waits for the end of ctx if that is due: gRPC and the other side know the deadline as well,
// and may say so a moment before.
func expire(ctx context.Context) {
	const moment = 100 * time.Millisecond
	deadline, ok := ctx.Deadline()
	if !ok || time.Until(deadline) > moment {
		return
	}
	<-ctx.Done()
}

// ofStatus is the error of an answer, of a call or of one blob of a batch.
func ofStatus(code codes.Code, text string) error {
	const longest = 256
	text = text[:min(len(text), longest)]
	switch code {
	case codes.OK:
		return nil
	case codes.NotFound:
		return fmt.Errorf("%w: %s", cas.ErrNotFound, text)
	case codes.DataLoss:
		return fmt.Errorf("%w: the upstream cache says so: %s", cas.ErrMismatch, text)
	case codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return fmt.Errorf("%w: %v: %s", errForbidden, code, text)
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange, codes.AlreadyExists:
		return fmt.Errorf("%w: %v: %s", ErrRefused, code, text)
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown, codes.Internal, codes.Aborted, codes.ResourceExhausted:
		return fmt.Errorf("%w: upstream cache: %v: %s", cas.ErrUnavailable, code, text)
	}
	return fmt.Errorf("%w: upstream cache: %v: %s", cas.ErrUnavailable, code, text)
}

// alive tells whether an error of a call shows that the upstream answers.
func alive(err error) bool {
	return err == nil || errors.Is(err, cas.ErrNotFound) || errors.Is(err, ErrRefused) || errors.Is(err, cas.ErrMismatch) || errors.Is(err, cas.ErrFull)
}
