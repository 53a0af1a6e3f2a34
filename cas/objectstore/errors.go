package objectstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
)

var (
	// errExists is the broker's refusal of a message whose subject has one already.
	errExists = errors.New("already stored")
	// errNoRoom is a refusal because of the size of what is stored already.
	errNoRoom = errors.New("the broker has no room")
	// errBusy is a refusal that a later attempt may not meet: too many messages wait to be stored, or
	// one of the same subject does.
	errBusy = errors.New("the stream is busy")
	// errTimeout is the cause of a context that ended a request.
	errTimeout = fmt.Errorf("%w: the broker did not answer in time", cas.ErrUnavailable)
)

// Error codes of the JetStream API.
const (
	codeAccountResources  = 10002
	codeInsufficient      = 10023
	codeMemoryResources   = 10028
	codeNoMessage         = 10037
	codeStorageResources  = 10047
	codeWrongLastSequence = 10071
	codeStoreFailed       = 10077
	// The leader has another message of the subject in flight; whether that gets stored is open.
	codeWrongLastSequenceInFlight = 10164
	codeTooManyRequests           = 10167
)

// apiError turns a refusal by the broker into errExists, errBusy, cas.ErrNotFound, cas.ErrFull or
// cas.ErrUnavailable.
func apiError(err *jetstream.APIError) error {
	switch err.ErrorCode { //nolint:exhaustive // the others have no meaning of their own here
	case codeWrongLastSequence:
		return fmt.Errorf("%w: %w", errExists, err)
	case codeWrongLastSequenceInFlight, codeTooManyRequests:
		return fmt.Errorf("%w: %w", errBusy, err)
	case codeNoMessage:
		return fmt.Errorf("%w: %w", cas.ErrNotFound, err)
	case codeStoreFailed, codeInsufficient, codeStorageResources, codeMemoryResources, codeAccountResources:
		return fmt.Errorf("%w: %w: %w", cas.ErrFull, errNoRoom, err)
	}
	if err.Code == 429 {
		return fmt.Errorf("%w: %w", errBusy, err)
	}
	return fmt.Errorf("%w: %w", cas.ErrUnavailable, err)
}

// brokerError turns any error of a request into one of apiError's, or into the cause of ctx when
// that is what ended the request.
func brokerError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ended(ctx)
	}
	return refusalError(err)
}

// refusalError is brokerError for an answer, which says the same whether or not a context ended.
func refusalError(err error) error {
	if api, ok := errors.AsType[*jetstream.APIError](err); ok {
		return apiError(api)
	}
	if errors.Is(err, nats.ErrMaxPayload) {
		return err
	}
	return fmt.Errorf("%w: %w", cas.ErrUnavailable, err)
}

// ended is the error of a call whose context has ended.
func ended(ctx context.Context) error {
	return fmt.Errorf("interrupted: %w", context.Cause(ctx))
}

// detached returns a context for cleaning up after ctx has ended. It ends after timeout.
func detached(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(context.WithoutCancel(ctx), timeout, errTimeout) //nolint:forbidigo // bounded
}
