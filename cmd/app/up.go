package app

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"time"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// Up is the whole farm in one process.
type Up struct {
	serveFlags     `embed:""`
	executionFlags `embed:""`
	httpFlags      `embed:""`
	assetFlags     `embed:""`
	memoryFlags    `embed:""`
	upstreamFlags  `embed:""`
	casFlags       `embed:""`
	Data           string `help:"Directory of everything the farm keeps. Default: the user's state directory." type:"path" placeholder:"DIR"`
	HTTP           string `name:"http" help:"Address of the HTTP cache, /healthz, /readyz and /metrics." default:"127.0.0.1:8080" env:"JETFARM_HTTP"`
	Listen         string `help:"Address at which more workers, frontends and NATS tools reach the embedded NATS server." default:"127.0.0.1:0"`
	MaxStore       size   `help:"Most bytes of blobs and records on disk. Default: three quarters of what is free." placeholder:"SIZE"`
	SyncAlways     bool   `help:"Wait for the disk with every write. Otherwise a power cut may lose the last second."`
}

// lastGrace is how long open calls may go on when the worker has drained: nothing that they wait for
// can still happen here.
const lastGrace = 2 * time.Second

func (u *Up) run(ctx context.Context, p *process) error { //nolint:funlen // one thing after another, each with its end
	platform, err := u.executionFlags.validate()
	addresses := checkAddresses(map[string]string{"grpc": u.GRPC, "http": u.HTTP, "listen": u.Listen})
	err = errors.Join(err, addresses, u.checkInstances(), u.memoryFlags.validate(), u.checkSizes(), u.checkUpstream(), u.checkAssets(), u.checkCAS())
	if err != nil {
		return err
	}
	data, err := dataDir(u.Data)
	if err != nil {
		return err
	}
	unlock, err := run.LockDir(data)
	if err != nil {
		return err
	}
	defer unlock()
	listeners, err := listen(ctx, u.GRPC, u.HTTP)
	if err != nil {
		return err
	}
	defer listeners.close()
	tune := tuneMemory(p.log)
	server, err := broker.StartServer(ctx, broker.ServerConfig{
		Dir: data, Listen: u.Listen, MaxStore: int64(u.MaxStore), SyncAlways: u.SyncAlways, Log: p.log,
	})
	if err != nil {
		return err
	}
	defer server.Stop()
	if err := u.fits(server); err != nil {
		return err
	}
	forget, err := tellAddress(data, "nats", server.URL(), "grpc", listeners.grpc.Addr().String(), "http", listeners.httpAddress())
	if err != nil {
		return err
	}
	defer forget()
	farm, err := openFarm(ctx, p, broker.ConnectConfig{Embedded: server, Name: "jetfarm up"}, u.bound(u.farm(1)))
	if err != nil {
		return err
	}
	defer farm.close()
	executor, err := newExecutor(ctx, p, farm, u.executionFlags, platform, defaultWorkerName(), filepath.Join(data, "worker"))
	if err != nil {
		return err
	}
	defer executor.close(context.WithoutCancel(ctx), p)
	small, err := u.remember(ctx, p, farm, filepath.Join(data, "small"), executor.disk)
	if err != nil {
		return err
	}
	defer small.close(context.WithoutCancel(ctx), p)
	stores, err := u.behind(ctx, p, farm, small.blobs)
	if err != nil {
		return err
	}
	defer stores.close(context.WithoutCancel(ctx), p)
	assets, err := u.assets(ctx, p, farm, data)
	if err != nil {
		return err
	}
	api := newFrontend(p, farm, stores, assets, u.serveFlags, true)
	handler := api.HTTP(run.Probes(run.ProbeConfig{Ready: api.Ready, Gatherer: farm.metrics, Pprof: u.Pprof}))
	return run.Beside(ctx, func(ctx context.Context) error {
		return serveFrontend(ctx, listeners, api, handler, lastGrace, func(ctx context.Context) error {
			if err := farm.client.Ready(ctx); err != nil {
				return err
			}
			if err := p.ready("grpc", listeners.grpc.Addr().String(), "http", listeners.httpAddress(), "nats", server.URL()); err != nil {
				return err
			}
			return executor.serve(ctx)
		})
	}, slices.Concat(farm.services(), []func(context.Context) error{tune, tellRoom(server, farm.connections[0])}, executor.services(), small.services(), stores.services())...)
}
