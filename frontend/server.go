package frontend

import (
	"context"
	"log/slog"
	"runtime"
	"sync/atomic"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	remoteasset "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip" // some clients compress messages, whatever is in them
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/chunking"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Config says what a Server serves. Blobs, Actions, Broker and Log are required.
type Config struct {
	Blobs   cas.Store
	Actions actioncache.Results
	Broker  *broker.Client
	Log     *slog.Logger
	// Executed is told each action whose operation a client has followed to a result; nil tells nobody.
	// It must not block.
	Executed func(action digest.Digest)
	// Full tells why nothing can be stored, and nil when it can; nil where that never happens.
	Full func() error
	// Registerer gets the metrics; nil keeps them private.
	Registerer prometheus.Registerer
	// Limits that are zero take their defaults; Limits.Validate tells those that cannot work.
	Limits Limits
	// AllowActionCacheUpdates lets clients write the action cache. Results that clients write are
	// believed by everyone, so the default is that only workers write.
	AllowActionCacheUpdates bool
	// OpaqueResults lets clients of the HTTP cache keep values below /ac/ that are no ActionResult.
	OpaqueResults bool
	// Instances are the instance names that are served; nil serves every one.
	Instances Instances
	// Assets offers the Remote Asset API; nil does not.
	Assets *Assets
	// Chunks are the parameters by which blobs are split into chunks, which Params.Validate checks; nil
	// offers neither splitting nor splicing.
	Chunks *chunking.Params
	// ExecEnabled offers remote execution; without it the farm is a cache.
	ExecEnabled bool
}

// Server is the endpoint. New makes one; GRPC and HTTP are what to serve; Shutdown ends it.
type Server struct {
	cfg     Config
	grpc    *grpc.Server
	health  *health.Server
	metrics *metrics
	http    *httpCache
	assets  *assets // nil when they are not offered
	waiters *waiters
	readers *waiters        // of logs
	unary   map[string]bool // full names of unary methods; written by New only
	drained atomic.Bool
}

// New returns a server with every service registered. It starts nothing.
func New(cfg Config) *Server {
	cfg.Limits = cfg.Limits.withDefaults()
	s := &Server{cfg: cfg, health: health.NewServer(), waiters: newWaiters(), readers: newWaiters(), unary: make(map[string]bool)}
	s.metrics = newMetrics(cfg.Registerer, s.waiters.count)
	s.grpc = grpc.NewServer(s.options()...)
	s.register()
	for service, info := range s.grpc.GetServiceInfo() {
		s.health.SetServingStatus(service, healthpb.HealthCheckResponse_SERVING)
		for _, method := range info.Methods {
			if !method.IsClientStream && !method.IsServerStream {
				s.unary["/"+service+"/"+method.Name] = true
			}
		}
	}
	return s
}

func (s *Server) register() {
	cfg, limits := s.cfg, s.cfg.Limits
	in := &inliner{blobs: cfg.Blobs, limits: limits}
	ans := &answers{broker: cfg.Broker, blobs: cfg.Blobs, inline: in, limits: limits}
	repb.RegisterCapabilitiesServer(s.grpc, &capabilities{
		limits: limits, updates: cfg.AllowActionCacheUpdates, execute: cfg.ExecEnabled, chunks: cfg.Chunks,
	})
	blobs := newContent(cfg.Blobs, limits, s.metrics)
	blobs.chunks = newChunker(cfg.Blobs, limits, cfg.Chunks)
	repb.RegisterContentAddressableStorageServer(s.grpc, blobs)
	streams := newByteStream(cfg.Blobs, limits, s.metrics)
	streams.logs = newLogs(cfg, ans, s.readers)
	bytestream.RegisterByteStreamServer(s.grpc, streams)
	results := &actionCache{
		actions: cfg.Actions, blobs: cfg.Blobs, inline: in, limits: limits, metrics: s.metrics, updates: cfg.AllowActionCacheUpdates,
	}
	repb.RegisterActionCacheServer(s.grpc, results)
	s.http = &httpCache{
		blobs: cfg.Blobs, actions: results, instances: cfg.Instances, limits: limits, metrics: s.metrics,
		http: newHTTPMetrics(cfg.Registerer), opaque: cfg.OpaqueResults,
	}
	repb.RegisterExecutionServer(s.grpc, &execution{
		broker: cfg.Broker, actions: cfg.Actions, blobs: cfg.Blobs, answers: ans, waiters: s.waiters,
		limits: limits, metrics: s.metrics, enabled: cfg.ExecEnabled, executed: cfg.Executed,
		rate: rate.NewLimiter(rate.Limit(limits.ExecuteRate), limits.ExecuteRate),
	})
	if cfg.Assets != nil {
		s.assets = newAssets(cfg)
		remoteasset.RegisterFetchServer(s.grpc, fetchService{assets: s.assets})
		remoteasset.RegisterPushServer(s.grpc, pushService{assets: s.assets})
	}
	longrunningpb.RegisterOperationsServer(s.grpc, &operations{broker: cfg.Broker, answers: ans, limits: limits})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
}

// options are the settings of the gRPC server. There is no maximum connection age: it would cut
// Execute streams, which some clients do not take up again.
func (s *Server) options() []grpc.ServerOption {
	const buffer, headers = 128 << 10, 64 << 10
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxRecvMsgSize(s.cfg.Limits.MaxReceiveBytes),
		grpc.MaxConcurrentStreams(s.cfg.Limits.MaxStreams),
		grpc.MaxHeaderListSize(headers),
		grpc.ConnectionTimeout(s.cfg.Limits.Handshake),
		grpc.InitialWindowSize(1 << 20),
		grpc.InitialConnWindowSize(4 << 20),
		grpc.ReadBufferSize(buffer),
		grpc.WriteBufferSize(buffer),
		grpc.NumStreamWorkers(uint32(runtime.GOMAXPROCS(0))), //nolint:gosec // a small positive number
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: s.cfg.Limits.Silence, Timeout: max(time.Second, s.cfg.Limits.Silence/3)}),
		grpc.InTapHandle(s.tap),
		grpc.UnaryInterceptor(s.interceptUnary),
		grpc.StreamInterceptor(s.interceptStream),
	}
}

// GRPC is the gRPC server with all services, health and reflection.
func (s *Server) GRPC() *grpc.Server { return s.grpc }

// Ready returns nil while the server takes work, blobs can be stored, and it can publish to and receive from the broker, which
// it tries. It is bounded by ctx.
func (s *Server) Ready(ctx context.Context) error {
	if s.drained.Load() {
		return errDraining
	}
	if s.cfg.Full != nil {
		if err := s.cfg.Full(); err != nil {
			return err
		}
	}
	return s.cfg.Broker.Ready(ctx)
}

// Drain makes the server tell NOT_SERVING and refuse Execute, WaitExecution and readers of logs with
// UNAVAILABLE. Everything else is served on, as are the streams that are open.
func (s *Server) Drain() {
	s.drained.Store(true)
	s.waiters.refuse(errDraining)
	s.readers.refuse(errDraining)
	s.health.Shutdown()
}

// lastCall is how long Shutdown lets clients take what it tells them last.
const lastCall = time.Second

// Shutdown drains the server and returns when it has ended. Open calls may finish until ctx ends; then
// operation streams get UNAVAILABLE, so that their clients go on at another frontend, and a moment
// later all that is left is cut off.
func (s *Server) Shutdown(ctx context.Context) error {
	s.Drain()
	var g errgroup.Group
	stopped := make(chan struct{})
	g.Go(func() error {
		defer close(stopped)
		s.grpc.GracefulStop()
		return nil
	})
	defer s.assets.close()
	select {
	case <-stopped:
		return g.Wait()
	case <-ctx.Done():
	}
	s.waiters.end(errDraining)
	s.readers.end(errDraining)
	s.assets.close()
	timer := time.NewTimer(lastCall)
	defer timer.Stop()
	select {
	case <-stopped:
	case <-timer.C:
		s.grpc.Stop()
	}
	return g.Wait()
}
