package broker

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// requestTimeout bounds one request to the broker whose caller set no earlier deadline.
const requestTimeout = 5 * time.Second

// onceReconnects is how often a connection that did not wait for the server at first comes back.
const onceReconnects = 20

// ConnectConfig says where a connection goes.
type ConnectConfig struct {
	// Servers are NATS URLs. Ignored when Embedded is set.
	Servers []string
	// Embedded is a server in this process.
	Embedded *Server
	// Name shows in the server's connection list.
	Name string
	// Once fails with the first error instead of waiting for the server, for commands that somebody
	// watches.
	Once bool
	Log  *slog.Logger
}

// Connect opens a connection that reconnects for ever. It waits for the first one to succeed until
// ctx ends, so processes may start in any order; what it could not reach is in the error and, once a
// second, in the log. With Once it does not wait.
func Connect(ctx context.Context, cfg ConnectConfig) (*nats.Conn, error) {
	connected := make(chan struct{}, 1)
	var refused atomic.Value
	options := []nats.Option{
		nats.Name(cfg.Name),
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(true),
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(250*time.Millisecond, 250*time.Millisecond),
		nats.ReconnectBufSize(-1),
		nats.IgnoreAuthErrorAbort(), // credentials may be put right while the process waits
		nats.Timeout(requestTimeout),
		nats.FlusherTimeout(requestTimeout),
		nats.PingInterval(10 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.ConnectHandler(func(*nats.Conn) { connected <- struct{}{} }),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			cfg.Log.WarnContext(ctx, "nats connection", "name", cfg.Name, "subject", subject, "err", err)
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				cfg.Log.WarnContext(ctx, "nats disconnected", "name", cfg.Name, "err", err)
			}
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) {
			refused.Store(err.Error())
			cfg.Log.DebugContext(ctx, "nats reconnect failed", "name", cfg.Name, "err", err)
		}),
	}
	if cfg.Once {
		options = append(options, nats.RetryOnFailedConnect(false), nats.MaxReconnects(onceReconnects))
	}
	if cfg.Embedded != nil {
		options = append(options, nats.InProcessServer(cfg.Embedded.nats))
	}
	nc, err := nats.Connect(strings.Join(cfg.Servers, ","), options...)
	if err != nil {
		return nil, fmt.Errorf("connect to nats %s: %w", strings.Join(cfg.Servers, ","), err)
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-connected:
			return nc, nil
		case <-ctx.Done():
			nc.Close()
			return nil, fmt.Errorf("connect to nats %s: %w (last error: %v)", strings.Join(cfg.Servers, ","), context.Cause(ctx), refused.Load())
		case <-tick.C:
			if nc.IsConnected() {
				return nc, nil
			}
			cfg.Log.WarnContext(ctx, "waiting for nats", "servers", strings.Join(cfg.Servers, ","), "err", refused.Load())
		}
	}
}
