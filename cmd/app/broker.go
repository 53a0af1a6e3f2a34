package app

import (
	"context"
	"errors"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// Broker is a NATS server with JetStream and the settings that the farm was measured with.
type Broker struct {
	Data       string   `help:"Directory of the streams. Default: the user's state directory." type:"path" placeholder:"DIR"`
	Listen     string   `help:"Address for clients." default:"127.0.0.1:4222"`
	Cluster    string   `help:"Address for the other servers of a cluster. Without it the server is alone." placeholder:"HOST:PORT"`
	Routes     []string `help:"Cluster addresses of the other servers." placeholder:"nats://HOST:PORT,..."`
	Name       string   `help:"Name of this server, unique and the same at each start." default:"${hostname}"`
	NatsConfig string   `help:"A nats-server configuration file for all else; the flags win over it." type:"existingfile" placeholder:"FILE"`
	MaxStore   size     `help:"Most bytes on disk. Default: three quarters of what is free." placeholder:"SIZE"`
	SyncAlways bool     `help:"Wait for the disk with every write. Otherwise a power cut may lose the last second."`
	HTTP       string   `name:"http" help:"Address of /healthz, /readyz and /metrics; empty serves none." placeholder:"HOST:PORT"`
	httpFlags  `embed:""`
}

func (b *Broker) validate() error {
	if err := checkAddresses(map[string]string{"listen": b.Listen, "cluster": b.Cluster, "http": b.HTTP}); err != nil {
		return err
	}
	if len(b.Routes) > 0 && b.Cluster == "" {
		return run.UsageError{Err: errors.New("--routes needs --cluster, the address at which this server is one of the cluster")}
	}
	if b.Listen == "" {
		return run.UsageError{Err: errors.New("--listen is empty; a broker without an address serves nobody")}
	}
	return nil
}

func (b *Broker) run(ctx context.Context, p *process) error {
	if err := b.validate(); err != nil {
		return err
	}
	data, err := dataDir(b.Data)
	if err != nil {
		return err
	}
	unlock, err := run.LockDir(data)
	if err != nil {
		return err
	}
	defer unlock()
	tune := tuneMemory(p.log)
	server, err := broker.StartServer(ctx, broker.ServerConfig{
		Dir: data, Name: b.Name, Listen: b.Listen, Cluster: b.Cluster, Routes: b.Routes, File: b.NatsConfig,
		MaxStore: int64(b.MaxStore), SyncAlways: b.SyncAlways, Log: p.log,
	})
	if err != nil {
		return err
	}
	defer server.Stop()
	forget, err := tellAddress(data, "nats", server.URL())
	if err != nil {
		return err
	}
	defer forget()
	tell, done := teller(ctx, p, server)
	defer done()
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	handler := run.Probes(run.ProbeConfig{Ready: server.Ready, Gatherer: metrics, Pprof: b.Pprof})
	return withHTTP(ctx, b.HTTP, handler, func(ctx context.Context, address string) error {
		return run.Beside(ctx, func(ctx context.Context) error {
			if err := p.ready("http", address, "nats", server.URL()); err != nil {
				return err
			}
			<-ctx.Done()
			return context.Cause(ctx)
		}, tell, tune)
	})
}

// withHTTP serves handler beside main, which is told the address; none when address is empty.
func withHTTP(ctx context.Context, address string, handler http.Handler, main func(ctx context.Context, address string) error) error {
	if address == "" {
		return main(ctx, "")
	}
	l, err := run.Listen(ctx, "HTTP", address)
	if err != nil {
		return err
	}
	return run.Beside(ctx, func(ctx context.Context) error { return main(ctx, l.Addr().String()) },
		func(ctx context.Context) error { return run.HTTP(ctx, l, handler, run.HTTPGrace) })
}
