package objectstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jetfarm/jetfarm/cas"
)

// retryDelay bounds the first pause between two attempts; it is doubled with every attempt.
const retryDelay = 20 * time.Millisecond

const (
	busyAttempts  = 6 // about 0.3 s
	cleanAttempts = 8 // about 1.3 s, in which a lost connection should be back
)

// retry calls f until it returns something else than transient, with growing random pauses in
// between. After the last attempt transient is returned as it is.
func retry(ctx context.Context, attempts int, transient error, f func() error) error {
	for attempt := 1; ; attempt++ {
		err := f()
		if !errors.Is(err, transient) || attempt == attempts {
			return err
		}
		if err := pause(ctx, rand.N(retryDelay<<attempt)); err != nil { //nolint:gosec // spreads retries
			return err
		}
	}
}

// whileBusy retries f while it is errBusy. What stays busy is cas.ErrUnavailable.
func whileBusy(ctx context.Context, f func() error) error {
	return notBusy(retry(ctx, busyAttempts, errBusy, f))
}

// notBusy turns errBusy into cas.ErrUnavailable.
func notBusy(err error) error {
	if errors.Is(err, errBusy) {
		return fmt.Errorf("%w: %w", cas.ErrUnavailable, err)
	}
	return err
}

// pause returns nil after d or the error of ctx.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	}
}
