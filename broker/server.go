package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// ServerConfig says how the embedded NATS server runs.
type ServerConfig struct {
	// Dir is where JetStream keeps its streams. It must belong to this server alone.
	Dir string
	// Name identifies the server; in a cluster it must be unique and stable. Empty picks "jetfarm".
	Name string
	// Listen is the HOST:PORT for clients; port 0 picks one. Empty serves this process only.
	Listen string
	// Cluster is the HOST:PORT for the other servers of a cluster; empty runs alone.
	Cluster string
	// Routes are the nats://HOST:PORT cluster addresses of the other servers.
	Routes []string
	// File is a nats-server configuration file that is read first; the fields above override it.
	File string
	// MaxStore bounds the bytes on disk; 0 lets the server take three quarters of what is free.
	MaxStore int64
	// SyncAlways makes every write wait for the disk; otherwise files are synced once a second.
	SyncAlways bool
	Log        *slog.Logger
}

// Server is an embedded NATS server with JetStream. StartServer makes one; Stop ends it.
type Server struct {
	nats *server.Server
	log  *serverLog
}

// The settings that differ from nats-server's defaults, for the reasons in docs/OPERATIONS.md.
const (
	maxPayload    = 4 << 20
	maxPending    = 256 << 20
	maxBuffered   = 256 << 20
	writeDeadline = 30 * time.Second
	syncInterval  = time.Second
	startBound    = 5 * time.Minute
)

// StartServer starts the server and returns when it accepts clients and has recovered its streams.
func StartServer(ctx context.Context, cfg ServerConfig) (*Server, error) {
	opts, err := serverOptions(cfg)
	if err != nil {
		return nil, err
	}
	ns, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("nats server: %w", err)
	}
	s := &Server{nats: ns, log: &serverLog{ctx: ctx, log: cfg.Log}}
	ns.SetLoggerV2(s.log, false, false, false)
	ns.Start()
	ctx, cancel := context.WithTimeoutCause(ctx, startBound, fmt.Errorf("nats server: not ready after %v", startBound))
	defer cancel()
	for !ns.ReadyForConnections(50 * time.Millisecond) {
		if text := s.log.fatal.Load(); text != nil {
			s.Stop()
			return nil, fmt.Errorf("nats server: %s", *text)
		}
		if ctx.Err() != nil {
			s.Stop()
			return nil, context.Cause(ctx)
		}
	}
	if !ns.JetStreamEnabled() {
		s.Stop()
		return nil, errors.New("nats server: JetStream did not start; see the log for the reason")
	}
	return s, nil
}

// URL is where clients connect, or "" when the server serves only this process.
func (s *Server) URL() string {
	if s.nats.Addr() == nil {
		return ""
	}
	return s.nats.ClientURL()
}

// Ready tells whether JetStream answers; in a cluster, whether it knows its leader.
func (s *Server) Ready(context.Context) error {
	if !s.nats.JetStreamEnabled() {
		return fmt.Errorf("%w: JetStream is off", ErrUnavailable)
	}
	if s.nats.JetStreamIsClustered() && !s.nats.JetStreamIsCurrent() {
		return fmt.Errorf("%w: the cluster has no leader, or this server is behind it", ErrUnavailable)
	}
	return nil
}

// Clustered tells whether the server belongs to a cluster.
func (s *Server) Clustered() bool { return s.nats.ClusterAddr() != nil }

// Subscriptions counts the clients' subscriptions to subjects with a prefix.
func (s *Server) Subscriptions(prefix string) int {
	connections, err := s.nats.Connz(&server.ConnzOptions{Subscriptions: true, Limit: math.MaxInt32})
	if err != nil {
		return -1
	}
	n := 0
	for _, connection := range connections.Conns {
		for _, subject := range connection.Subs {
			if strings.HasPrefix(subject, prefix) {
				n++
			}
		}
	}
	return n
}

// Stop ends the server and waits until its files are closed.
func (s *Server) Stop() {
	s.nats.Shutdown()
	s.nats.WaitForShutdown()
}

func serverOptions(cfg ServerConfig) (*server.Options, error) {
	opts := &server.Options{DontListen: true}
	if cfg.File != "" {
		read, err := server.ProcessConfigFile(cfg.File)
		if err != nil {
			return nil, fmt.Errorf("nats configuration %s: %w", cfg.File, err)
		}
		opts = read
	}
	opts.NoSigs = true
	opts.JetStream = true
	opts.StoreDir = filepath.Join(cfg.Dir, "nats")
	opts.DisableJetStreamBanner = true
	opts.SyncInterval = syncInterval
	opts.SyncAlways = cfg.SyncAlways
	opts.StreamMaxBufferedSize = maxBuffered
	if opts.MaxPayload < maxPayload {
		opts.MaxPayload = maxPayload
	}
	opts.MaxPending = maxPending
	opts.WriteDeadline = writeDeadline
	if cfg.MaxStore > 0 {
		opts.JetStreamMaxStore = cfg.MaxStore
	}
	if opts.ServerName == "" || cfg.Name != "" {
		opts.ServerName = cfg.Name
	}
	if opts.ServerName == "" {
		opts.ServerName = "jetfarm"
	}
	if cfg.Listen != "" {
		host, port, err := splitAddress(cfg.Listen)
		if err != nil {
			return nil, fmt.Errorf("listen address %q: %w", cfg.Listen, err)
		}
		opts.Host, opts.Port, opts.DontListen = host, port, false
	}
	if cfg.Cluster != "" {
		host, port, err := splitAddress(cfg.Cluster)
		if err != nil {
			return nil, fmt.Errorf("cluster address %q: %w", cfg.Cluster, err)
		}
		opts.Cluster.Name, opts.Cluster.Host, opts.Cluster.Port = "jetfarm", host, port
		for _, route := range cfg.Routes {
			opts.Routes = append(opts.Routes, server.RoutesFromStr(route)...)
		}
	}
	return opts, nil
}

// splitAddress maps port 0 to nats-server's notion of a random port.
func splitAddress(address string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, err
	}
	port, err = strconv.Atoi(text)
	if err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("port %q is not a number from 0 to 65535", text)
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// serverLog hands the server's log lines to slog and keeps the first fatal one, which the server
// logs instead of returning. Its context is that of the start: nats-server's logger has none.
type serverLog struct {
	ctx   context.Context //nolint:containedctx // the interface of nats-server has no context parameter
	log   *slog.Logger
	fatal atomic.Pointer[string]
}

func (l *serverLog) write(level slog.Level, format string, v []any) {
	l.log.Log(l.ctx, level, "nats server", "text", fmt.Sprintf(format, v...))
}

func (l *serverLog) Noticef(format string, v ...any) { l.write(slog.LevelDebug, format, v) }
func (l *serverLog) Warnf(format string, v ...any)   { l.write(slog.LevelWarn, format, v) }
func (l *serverLog) Errorf(format string, v ...any)  { l.write(slog.LevelError, format, v) }
func (l *serverLog) Debugf(format string, v ...any)  { l.write(slog.LevelDebug, format, v) }
func (l *serverLog) Tracef(format string, v ...any)  { l.write(slog.LevelDebug, format, v) }

func (l *serverLog) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.fatal.CompareAndSwap(nil, &text)
	l.write(slog.LevelError, "%s", []any{text})
}
