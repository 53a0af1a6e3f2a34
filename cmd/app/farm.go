package app

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// farm is what the roles that are not the broker share: the connections and what is on them.
type farm struct {
	connections []*nats.Conn
	client      *broker.Client
	blobs       *objectstore.Store
	actions     *actioncache.Cache
	metrics     *prometheus.Registry
}

// farmConfig is what roles want of what they share. Zero keeps what is there.
type farmConfig struct {
	replicas     int
	patience     time.Duration
	actionBytes  int64 // bound on the action cache
	actionMemory int64 // bound on what of it is in memory; 0 is none
	compression  objectstore.Compression
	submits      bool               // whether clients' operations come in here
	maxTenant    int64              // operations that may wait for one instance name
	blobs        objectstore.Config // bounds on the blobs
}

// openFarm connects to the broker and opens operations, blobs and the action cache on it. Operations,
// small blobs and large blobs have a connection each, since a large transfer delays all else on
// its own.
func openFarm(ctx context.Context, p *process, to broker.ConnectConfig, cfg farmConfig) (*farm, error) {
	f := &farm{metrics: prometheus.NewRegistry()}
	f.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if err := f.open(ctx, p, to, cfg); err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *farm) open(ctx context.Context, p *process, to broker.ConnectConfig, cfg farmConfig) (err error) {
	role := to.Name
	to.Log = p.log
	for _, use := range []string{"control", "small", "bulk"} {
		to.Name = role + " " + use
		nc, err := broker.Connect(ctx, to)
		if err != nil {
			return err
		}
		f.connections = append(f.connections, nc)
	}
	f.client, err = broker.New(broker.Config{
		Conn: f.connections[0], Replicas: cfg.replicas, Patience: cfg.patience, Submits: cfg.submits, MaxTenant: cfg.maxTenant, Log: p.log, Registerer: f.metrics,
	})
	if err != nil {
		return err
	}
	if err = f.client.Open(ctx); err != nil {
		return err
	}
	if cfg.submits {
		f.metrics.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "jetfarm_held_operations", Help: "Operations that wait at this frontend for their turn to enter the queue.",
		}, func() float64 { return float64(f.client.Held()) }))
	}
	blobs := cfg.blobs
	blobs.Small, blobs.Bulk, blobs.Replicas = f.connections[1], f.connections[2], f.client.Replicas()
	blobs.Log, blobs.Registerer, blobs.Compression = p.log, f.metrics, cfg.compression
	f.blobs, err = objectstore.Open(ctx, blobs)
	if err != nil {
		return fmt.Errorf("open the blob store: %w", err)
	}
	f.actions, err = actioncache.Open(ctx, actioncache.Config{
		Conn: f.connections[0], Blobs: f.blobs, Replicas: f.client.Replicas(), Log: p.log, Registerer: f.metrics,
		MaxBytes: cfg.actionBytes, MemoryBytes: cfg.actionMemory,
	})
	if err != nil {
		return fmt.Errorf("open the action cache: %w", err)
	}
	return nil
}

// services are what must run as long as the farm is used.
func (f *farm) services() []func(context.Context) error {
	return []func(context.Context) error{f.client.Run, f.blobs.Run, f.actions.Run}
}

// close ends the connections, after everything that uses them has ended.
func (f *farm) close() {
	for _, nc := range f.connections {
		nc.Close()
	}
}
