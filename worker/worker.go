package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/worker/contain"
	"github.com/jetfarm/jetfarm/worker/inputs"
	"github.com/jetfarm/jetfarm/worker/outputs"
	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// The causes that end a job's context.
var (
	errDraining      = errors.New("the worker is shutting down")
	errFinished      = errors.New("the job is finished")
	errFetchTimeout  = errors.New("fetching the inputs took too long")
	errUploadTimeout = errors.New("uploading the outputs took too long")
)

// Worker executes actions.
type Worker struct {
	cfg       Config
	dirs      *dirs
	pool      *sandbox.Pool
	loader    *inputs.Loader
	collector *outputs.Collector
	metrics   *metrics
	health    *health
	oom       *oomCounter
	logs      *logs
	// finishing has a token for each job that has a lease, so that jobs which no longer need a slot
	// can't pile up.
	finishing chan struct{}
}

// New prepares a worker: it chooses the isolation, kills and removes what an earlier worker in this
// directory left behind, and claims the slots. Run must follow, or Close.
func New(cfg Config) (*Worker, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	dirs, err := openDirs(cfg.Dir, cfg.Log)
	if err != nil {
		return nil, err
	}
	pool, err := sandbox.Open(sandbox.Config{Mode: sandbox.Mode(cfg.Isolation), Slots: cfg.Concurrency, Dir: dirs.run, Log: cfg.Log})
	if err != nil {
		return nil, errors.Join(err, dirs.close())
	}
	m := newMetrics(cfg.Registerer)
	return &Worker{
		cfg: cfg, dirs: dirs, pool: pool,
		loader:    inputs.NewLoader(cfg.Blobs, inputs.DefaultLimits()),
		collector: &outputs.Collector{Blobs: cfg.Blobs, Files: cfg.Disk, Limits: outputs.DefaultLimits()},
		metrics:   m,
		health:    &health{queue: cfg.Queue, metrics: m},
		oom:       &oomCounter{path: "/proc/vmstat"},
		logs:      newLogs(cfg.MaxLog),
		finishing: make(chan struct{}, finishingPerSlot*cfg.Concurrency),
	}, nil
}

// finishingPerSlot is how many jobs may be underway for each slot, the running one included.
const finishingPerSlot = 4

// Isolation is how actions are kept apart: the text of a sandbox.Mode.
func (w *Worker) Isolation() string { return string(w.pool.Mode()) }

// Close gives the slots and the directory back. Run does it by itself.
func (w *Worker) Close() error { return errors.Join(w.pool.Close(), w.dirs.close()) }

// Run takes jobs until ctx ends. Then those that run have DrainTimeout to finish; what is left is
// killed and given back to the queue. Run returns when the last job is settled or given back.
func (w *Worker) Run(ctx context.Context) error {
	detached := context.WithoutCancel(ctx) //nolint:forbidigo // ends DrainTimeout after ctx
	jobs, kill := context.WithCancelCause(detached)
	defer kill(errFinished)
	cleaning, stop := context.WithCancelCause(detached)
	defer stop(errFinished)

	var running, background errgroup.Group
	background.Go(func() error { w.dirs.empty(cleaning); return nil })
	background.Go(func() error { return w.cfg.Queue.ServeLogs(cleaning, w.logs.read) })
	err := w.take(ctx, jobs, &running)
	timer := time.AfterFunc(w.cfg.DrainTimeout, func() { kill(errDraining) })
	err = errors.Join(err, running.Wait())
	timer.Stop()
	w.dirs.retire()
	stop(errFinished)
	return errors.Join(err, background.Wait(), w.Close())
}

// take starts a job in running for every lease, and asks for a lease when a slot is free.
func (w *Worker) take(ctx, jobs context.Context, running *errgroup.Group) error {
	for {
		select {
		case w.finishing <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		slot, err := w.pool.Acquire(ctx)
		if err != nil {
			<-w.finishing
			return nil //nolint:nilerr // ctx ended, and with it the taking
		}
		lease, err := w.next(ctx, slot)
		if err != nil {
			slot.Release()
			<-w.finishing
			if ctx.Err() != nil {
				return nil //nolint:nilerr // ctx ended, and with it the taking
			}
			return fmt.Errorf("take a job: %w", err)
		}
		w.metrics.busy.Inc()
		j := &job{w: w, lease: lease, spec: lease.Job(), slot: slot, started: time.Now(), begun: make(chan struct{})}
		running.Go(func() error {
			defer func() { <-w.finishing }()
			if err := contain.Panics(func() error { j.do(jobs); return nil })(); err != nil {
				w.cfg.Log.ErrorContext(jobs, "job abandoned", "operation", j.spec.Operation, "err", err)
				j.lease.Drop(jobs) // it is delivered again when its time is over
			}
			return nil
		})
	}
}
