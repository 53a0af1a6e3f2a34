package run

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
)

// Listen opens a TCP listener; port 0 picks one.
func Listen(ctx context.Context, what, address string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for %s on %s: %w", what, address, err)
	}
	return l, nil
}

// The bounds of an HTTP exchange with a client that stalls.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	httpStop      = 2 * time.Second
)

// HTTP serves h on l until ctx ends, lets open requests finish for a moment and returns.
func HTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	return Serve(ctx, func() error {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("http: %w", err)
		}
		return nil
	}, func() error {
		bound, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), httpStop, ErrStopped)
		defer cancel()
		if server.Shutdown(bound) != nil {
			return server.Close()
		}
		return nil
	})
}

// Serve runs a server until ctx ends or it fails, and then stops it.
func Serve(ctx context.Context, run, stop func() error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group errgroup.Group
	group.Go(func() error {
		err := run()
		cancel(err)
		return err
	})
	<-ctx.Done()
	return errors.Join(stop(), group.Wait())
}
