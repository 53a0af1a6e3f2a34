package app

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cmd/run"
	"github.com/jetfarm/jetfarm/frontend"
)

// Frontend serves the Remote Execution API.
type Frontend struct {
	natsFlags     `embed:""`
	serveFlags    `embed:""`
	httpFlags     `embed:""`
	assetFlags    `embed:""`
	memoryFlags   `embed:""`
	upstreamFlags `embed:""`
	casFlags      `embed:""`
	HTTP          string        `name:"http" help:"Address of the HTTP cache, /healthz, /readyz and /metrics." default:"127.0.0.1:8080" env:"JETFARM_HTTP"`
	Replicas      int           `help:"Servers of the NATS cluster that hold each message: 1, 3 or 5. 0 keeps what is there." default:"0"`
	DrainTimeout  time.Duration `help:"How long open calls may go on after SIGTERM. Clients take up Execute streams that are cut at another frontend." default:"10s"`
	CacheOnly     bool          `help:"Serve the cache without execution."`
	Data          string        `help:"Directory of a cache of blobs on disk. Default: blobs are not kept on disk." type:"path" placeholder:"DIR"`
	DiskCache     size          `help:"Bytes of blobs kept below the directory of --data; 0 keeps none." default:"10GiB"`
}

func (f *Frontend) validate() error {
	errs := []error{
		checkAddresses(map[string]string{"grpc": f.GRPC, "http": f.HTTP}), checkReplicas(f.Replicas), f.checkInstances(),
		f.memoryFlags.validate(), checkDiskCache(f.DiskCache), f.checkSizes(), f.checkUpstream(), f.checkAssets(), f.checkCAS(),
	}
	if f.DrainTimeout < 0 {
		errs = append(errs, run.UsageError{Err: errors.New("--drain-timeout is negative")})
	}
	return errors.Join(errs...)
}

func checkReplicas(n int) error {
	switch n {
	case 0, 1, 3, 5:
		return nil
	}
	return run.UsageError{Err: errors.New("--replicas must be 0, 1, 3 or 5")}
}

func (f *Frontend) run(ctx context.Context, p *process) error {
	if err := f.validate(); err != nil {
		return err
	}
	listeners, err := listen(ctx, f.GRPC, f.HTTP)
	if err != nil {
		return err
	}
	defer listeners.close()
	farm, err := openFarm(ctx, p, broker.ConnectConfig{Servers: f.NATS, Name: "jetfarm frontend"}, f.bound(f.farm(f.Replicas)))
	if err != nil {
		return err
	}
	defer farm.close()
	tier, err := openFrontendTier(ctx, p, farm, f.Data, f.DiskCache)
	if err != nil {
		return err
	}
	defer tier.close(context.WithoutCancel(ctx), p)
	small, err := f.remember(ctx, p, farm, smallDir(f.Data), tier.store(farm))
	if err != nil {
		return err
	}
	defer small.close(context.WithoutCancel(ctx), p)
	stores, err := f.behind(ctx, p, farm, small.blobs)
	if err != nil {
		return err
	}
	defer stores.close(context.WithoutCancel(ctx), p)
	assets, err := f.assets(ctx, p, farm, f.Data)
	if err != nil {
		return err
	}
	server := newFrontend(p, farm, stores, assets, f.serveFlags, !f.CacheOnly)
	handler := server.HTTP(run.Probes(run.ProbeConfig{Ready: server.Ready, Gatherer: farm.metrics, Pprof: f.Pprof}))
	return run.Beside(ctx, func(ctx context.Context) error {
		return serveFrontend(ctx, listeners, server, handler, f.DrainTimeout, func(ctx context.Context) error {
			if err := farm.client.Ready(ctx); err != nil {
				return err
			}
			if err := p.ready("grpc", listeners.grpc.Addr().String(), "http", listeners.httpAddress()); err != nil {
				return err
			}
			<-ctx.Done()
			return context.Cause(ctx)
		})
	}, slices.Concat(farm.services(), tier.services(), small.services(), stores.services())...)
}

// newFrontend makes the API server of a farm, which reads and writes the stores given.
func newFrontend(p *process, farm *farm, stores *served, assets *frontend.Assets, flags serveFlags, execute bool) *frontend.Server {
	cfg := frontend.Config{
		Blobs: stores.blobs, Actions: stores.results, Executed: stores.executed, Broker: farm.client, Full: farm.blobs.Full, Log: p.log, Registerer: farm.metrics,
		AllowActionCacheUpdates: flags.ActionCacheUpdates || !execute, ExecEnabled: execute, OpaqueResults: flags.HTTPOpaqueResults, Instances: flags.Instance, Assets: assets,
		Chunks: flags.chunks(), Limits: frontend.Limits{ExecuteRate: flags.ExecuteRate},
	}
	return frontend.New(cfg)
}

// serveFrontend serves the API while main runs. When ctx ends it tells clients at once that it takes
// no new work, lets main drain, and then gives open calls the grace to finish.
func serveFrontend(ctx context.Context, l *listeners, server *frontend.Server, handler http.Handler, grace time.Duration, main func(context.Context) error) error {
	stopped := context.AfterFunc(ctx, server.Drain)
	defer stopped()
	services := []func(context.Context) error{func(ctx context.Context) error {
		return run.Serve(ctx, func() error { return server.GRPC().Serve(l.grpc) }, func() error {
			bound, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), grace, run.ErrStopped)
			defer cancel()
			return server.Shutdown(bound)
		})
	}}
	if l.http != nil {
		services = append(services, func(ctx context.Context) error { return run.HTTP(ctx, l.http, handler, grace) })
	}
	return run.Beside(ctx, main, services...)
}

// listeners are the open ports of a role. They are opened before anything else, so that a port in
// use is found at once.
type listeners struct{ grpc, http net.Listener }

func listen(ctx context.Context, grpcAddress, httpAddress string) (l *listeners, err error) {
	l = new(listeners)
	if l.grpc, err = run.Listen(ctx, "gRPC", grpcAddress); err != nil {
		return nil, err
	}
	if httpAddress == "" {
		return l, nil
	}
	if l.http, err = run.Listen(ctx, "HTTP", httpAddress); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *listeners) httpAddress() string {
	if l.http == nil {
		return ""
	}
	return l.http.Addr().String()
}

// close closes what was not handed to a server; closing twice is harmless.
func (l *listeners) close() {
	for _, open := range []net.Listener{l.grpc, l.http} {
		if open != nil {
			open.Close() //nolint:errcheck // a listener that its server has closed says so
		}
	}
}
