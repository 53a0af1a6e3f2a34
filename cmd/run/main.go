package run

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sync/errgroup"
)

// ErrStopped is the cause with which the first signal ends a program's context.
var ErrStopped = errors.New("stopped by a signal")

// UsageError is an error of the command line or the configuration; the process exits with 2.
type UsageError struct{ Err error }

func (u UsageError) Error() string { return u.Err.Error() }

func (u UsageError) Unwrap() error { return u.Err }

// Main runs a program until it returns and returns the exit code: 0 after a clean stop, 1 after a
// failure, 2 for bad usage. SIGINT or SIGTERM end the program's context, upon which it drains; a
// second one ends the process at once with 1.
func Main(program func(ctx context.Context) error) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	// Not on this goroutine, which may be bound to a thread: that makes each wait of it four times as dear.
	var group errgroup.Group
	group.Go(func() error {
		defer close(done)
		return program(ctx)
	})
	for received, running := 0, true; running; {
		select {
		case s := <-signals:
			if received++; received > 1 {
				fmt.Fprintln(os.Stderr, "jetfarm: second signal: stopping at once")
				os.Exit(1)
			}
			cancel(fmt.Errorf("%w: %v", ErrStopped, s))
		case <-done:
			running = false
		}
	}
	err := group.Wait()
	signal.Stop(signals)
	cancel(err)
	switch {
	case err == nil, errors.Is(err, ErrStopped):
		return 0
	case errors.As(err, new(UsageError)):
		fmt.Fprintf(os.Stderr, "jetfarm: %v\n", err)
		return 2
	}
	fmt.Fprintf(os.Stderr, "jetfarm: %v\n", err)
	return 1
}
