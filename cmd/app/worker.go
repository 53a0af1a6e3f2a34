package app

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/cmd/run"
	"github.com/jetfarm/jetfarm/worker"
)

// Worker executes actions.
type Worker struct {
	natsFlags        `embed:""`
	executionFlags   `embed:""`
	httpFlags        `embed:""`
	compressionFlags `embed:""`
	Name             string `help:"Name of this worker, unique in the farm. Default: the host's name and the process id." placeholder:"NAME"`
	HTTP             string `name:"http" help:"Address of /healthz, /readyz and /metrics; empty serves none." default:"127.0.0.1:0" env:"JETFARM_HTTP"`
	Data             string `help:"Directory for cached inputs and running actions. Default: the user's state directory." type:"path" placeholder:"DIR"`
}

func (w *Worker) run(ctx context.Context, p *process) error {
	platform, err := w.validate()
	if err = errors.Join(err, checkAddresses(map[string]string{"http": w.HTTP})); err != nil {
		return err
	}
	data, err := dataDir(w.Data)
	if err != nil {
		return err
	}
	dir := filepath.Join(data, "worker")
	unlock, err := run.LockDir(dir)
	if err != nil {
		return err
	}
	defer unlock()
	farm, err := openFarm(ctx, p, broker.ConnectConfig{Servers: w.NATS, Name: "jetfarm worker"}, farmConfig{compression: w.CASCompression})
	if err != nil {
		return err
	}
	defer farm.close()
	name := w.Name
	if name == "" {
		name = defaultWorkerName()
	}
	executor, err := newExecutor(ctx, p, farm, w.executionFlags, platform, name, dir)
	if err != nil {
		return err
	}
	defer executor.close(context.WithoutCancel(ctx), p)
	handler := run.Probes(run.ProbeConfig{Ready: farm.client.Ready, Draining: ctx.Done(), Gatherer: farm.metrics, Pprof: w.Pprof})
	return run.Beside(ctx, func(ctx context.Context) error {
		return withHTTP(ctx, w.HTTP, handler, func(ctx context.Context, address string) error {
			if err := farm.client.Ready(ctx); err != nil {
				return err
			}
			if err := p.ready("http", address); err != nil {
				return err
			}
			return executor.serve(ctx)
		})
	}, append(farm.services(), executor.services()...)...)
}

func defaultWorkerName() string {
	return workerName(hostname()) + "-" + strconv.Itoa(os.Getpid())
}

// executor is a worker with its disk tier and its end of the queue.
type executor struct {
	worker *worker.Worker
	disk   *disk.Tier
	queue  *broker.Queue
}

// newExecutor makes the worker of a farm with its files below dir.
func newExecutor(ctx context.Context, p *process, farm *farm, flags executionFlags, platform broker.Platform, name, dir string) (*executor, error) {
	tier, err := disk.Open(ctx, disk.Config{
		Dir: filepath.Join(dir, "cache"), MaxBytes: int64(flags.DiskCache), Source: farm.blobs, Log: p.log, Registerer: farm.metrics,
		Verified: true, SecondRead: true, // Only up reads through it, with the broker in the same process.
	})
	if err != nil {
		return nil, err
	}
	name = workerName(name)
	queue := farm.client.Queue(broker.WorkerInfo{Name: name, Platform: platform, Slots: flags.Concurrency})
	e := &executor{disk: tier, queue: queue}
	e.worker, err = worker.New(worker.Config{
		Name: name, Dir: filepath.Join(dir, "actions"), Concurrency: flags.Concurrency, Platform: platform,
		Isolation: flags.Isolation, DrainTimeout: flags.DrainTimeout, MaxTimeout: flags.MaxTimeout, DefaultTimeout: flags.DefaultTimeout,
		Queue: queue, Blobs: farm.blobs, Disk: tier, Actions: farm.actions, Log: p.log, Registerer: farm.metrics,
	})
	if err != nil {
		e.close(ctx, p)
		return nil, err
	}
	queue.Isolated(e.worker.Isolation())
	return e, nil
}

// close gives the disk tier's directory free.
func (e *executor) close(ctx context.Context, p *process) {
	if err := e.disk.Close(); err != nil {
		p.log.WarnContext(ctx, "close the disk tier", "err", err)
	}
}

// serve executes actions until ctx ends and then drains.
func (e *executor) serve(ctx context.Context) error {
	told := make(chan struct{})
	unsaid := context.AfterFunc(ctx, func() {
		defer close(told)
		e.queue.Drain(context.WithoutCancel(ctx))
	})
	defer func() {
		if !unsaid() {
			<-told
		}
	}()
	if err := e.worker.Run(ctx); err != nil {
		return err
	}
	return context.Cause(ctx)
}

func (e *executor) services() []func(context.Context) error {
	return []func(context.Context) error{e.disk.Run, e.queue.Run}
}
