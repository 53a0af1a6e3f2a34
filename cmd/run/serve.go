package run

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/netutil"
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
	bodyTimeout   = 30 * time.Second
	answerTimeout = 2 * time.Minute
	// HTTPGrace is how long open requests may go on where nothing else says so.
	HTTPGrace = 2 * time.Second

	maxHeader      = 64 << 10
	maxConnections = 4096
)

// HTTP serves h on l until ctx ends, lets open requests finish within grace, cuts off what is left and
// returns when every handler has. A request's context ends with its connection.
//
// A handler's client has a bound for all that it sends and reads. One that serves large transfers, or
// takes its time, sets deadlines of its own with http.ResponseController.
func HTTP(ctx context.Context, l net.Listener, h http.Handler, grace time.Duration) error {
	base, cut := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cut(nil)
	var serving sync.RWMutex // held for reading by every handler
	server := &http.Server{
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		BaseContext: func(net.Listener) context.Context { return base },
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			serving.RLock()
			defer serving.RUnlock()
			bound(w, r)
			h.ServeHTTP(w, r)
		}),
	}
	return Serve(ctx, func() error {
		if err := server.Serve(netutil.LimitListener(l, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("http: %w", err)
		}
		return nil
	}, func() error {
		bound, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), grace, ErrStopped)
		defer cancel()
		if server.Shutdown(bound) == nil {
			return nil
		}
		err := server.Close()
		cut(ErrStopped)
		serving.Lock()
		defer serving.Unlock()
		return err
	})
}

// bound sets the deadlines that hold for handlers that set none. A body has one also when nobody reads
// it, since the server then does; without a body the server reads only to see the client leave.
func bound(w http.ResponseWriter, r *http.Request) {
	control, now := http.NewResponseController(w), time.Now()
	_ = control.SetWriteDeadline(now.Add(answerTimeout)) //nolint:errcheck // the server's own writer has deadlines
	if r.ContentLength != 0 {
		_ = control.SetReadDeadline(now.Add(bodyTimeout)) //nolint:errcheck // as above
	}
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
