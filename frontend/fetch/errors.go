package fetch

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/jetfarm/jetfarm/frontend/spool"
)

// Why an origin gave nothing. Every error of Get wraps one of these, unless ctx was cancelled.
var (
	// ErrNotFound reports an origin that does not have the content, or that does not exist.
	ErrNotFound = errors.New("not found at its origin")
	// ErrDenied reports an origin that refuses, or that may not be asked.
	ErrDenied = errors.New("not allowed")
	// ErrTimeout reports an origin that was too slow.
	ErrTimeout = errors.New("origin is too slow")
	// ErrExhausted reports content that is too large, an origin that asks for patience, or no room.
	ErrExhausted = errors.New("resource exhausted")
	// ErrFailed reports any other failure of an origin.
	ErrFailed = errors.New("fetch failed")
)

// answered is the error for a status other than 200.
func answered(status int) error {
	kind := ErrFailed
	switch status {
	case http.StatusNotFound, http.StatusGone:
		kind = ErrNotFound
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired, http.StatusUnavailableForLegalReasons:
		kind = ErrDenied
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		kind = ErrTimeout
	case http.StatusTooManyRequests, http.StatusInsufficientStorage:
		kind = ErrExhausted
	}
	return fmt.Errorf("%w: the origin says %d %s", kind, status, http.StatusText(status))
}

// classify wraps an error of a request that has ended for ctx, the network or the spool.
func classify(ctx context.Context, err error) error {
	for _, kind := range []error{ErrNotFound, ErrDenied, ErrTimeout, ErrExhausted, ErrFailed} {
		if errors.Is(err, kind) {
			return err
		}
	}
	if ctx.Err() != nil {
		cause := context.Cause(ctx)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) || errors.Is(cause, ErrTimeout) {
			return fmt.Errorf("%w: %w", ErrTimeout, cause)
		}
		return cause
	}
	var name *net.DNSError
	var network net.Error
	switch {
	case errors.Is(err, ErrBlocked):
		return fmt.Errorf("%w: %w", ErrDenied, err)
	case errors.Is(err, spool.ErrFull):
		return fmt.Errorf("%w: %w", ErrExhausted, err)
	case errors.As(err, &name) && name.IsNotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case errors.As(err, &network) && network.Timeout():
		return fmt.Errorf("%w: %w", ErrTimeout, err)
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}
