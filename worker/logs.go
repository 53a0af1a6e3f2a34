package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/worker/outputs"
)

// logs are the outputs of the commands that run, for those who read them meanwhile. An output that
// nobody reads costs an entry in a map.
type logs struct {
	limit int64 // bytes of an output that count

	mu      sync.Mutex
	running map[string]*runningLog // guarded by mu, by operation
}

// runningLog is the output of one command. Its files belong to another action once it is closed.
type runningLog struct {
	attempt int

	mu    sync.Mutex
	space *workspace // guarded by mu; nil when closed
}

func newLogs(limit int64) *logs { return &logs{limit: limit, running: map[string]*runningLog{}} }

// open makes the output of a command readable until the function that it returns is called.
func (l *logs) open(operation string, attempt int, space *workspace) (closed func()) {
	r := &runningLog{attempt: attempt, space: space}
	l.mu.Lock()
	l.running[operation] = r
	l.mu.Unlock()
	return func() {
		l.mu.Lock()
		if l.running[operation] == r {
			delete(l.running, operation)
		}
		l.mu.Unlock()
		r.mu.Lock()
		r.space = nil
		r.mu.Unlock()
	}
}

// read implements broker.LogReader.
func (l *logs) read(operation string, stream broker.LogStream, offset int64, p []byte) (n, attempt int, err error) {
	l.mu.Lock()
	r := l.running[operation]
	l.mu.Unlock()
	if r == nil {
		return 0, 0, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.space == nil {
		return 0, 0, nil
	}
	name := r.space.stdout()
	if stream == broker.Stderr {
		name = r.space.stderr()
	}
	n, err = readAt(name, offset, p[:max(0, min(int64(len(p)), l.limit-offset))])
	return n, r.attempt, err
}

// readAt reads from a file of the worker's own, for which an action of the worker's user may have put
// something else.
func readAt(name string, offset int64, p []byte) (int, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return 0, errors.Join(err, fmt.Errorf("%s is not a file", name))
	}
	n, err := f.ReadAt(p, offset)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// keepTimeout bounds the upload of what a cancelled action has written.
const keepTimeout = 10 * time.Second

// keepOutput stores what a cancelled command had written. Every process of it is dead. What can't be
// stored within keepTimeout is lost, which nobody's result depends on.
func (x *execution) keepOutput(ctx context.Context) {
	if !errors.Is(context.Cause(ctx), broker.ErrCancelled) {
		return
	}
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), keepTimeout, errUploadTimeout) //nolint:forbidigo // keepTimeout bounds it
	defer cancel()
	if err := x.uploadOutput(ctx); err != nil {
		x.w.cfg.Log.WarnContext(ctx, "output of a cancelled action not kept", "operation", x.spec.Operation, "err", err)
	}
}

func (x *execution) uploadOutput(ctx context.Context) (err error) {
	if err := x.space.restoreRoot(); err != nil {
		return err
	}
	space := x.spec.Action.Space()
	made, err := x.w.collector.Collect(ctx, outputs.Source{Root: x.space.root(), UID: x.slot.UID(), Space: space})
	if err != nil {
		return err
	}
	defer made.Close() //nolint:errcheck // nothing was written
	if err := x.space.shut(); err != nil {
		return err
	}
	x.release()
	err = errors.Join(
		made.Stdout(space, x.space.stdout(), x.w.cfg.MaxLog),
		made.Stderr(space, x.space.stderr(), x.w.cfg.MaxLog),
	)
	if err != nil {
		return err
	}
	if err := x.w.collector.Upload(ctx, made); err != nil {
		return err
	}
	stdout, err := space.Parse(made.Result.GetStdoutDigest())
	if err != nil {
		return err
	}
	stderr, err := space.Parse(made.Result.GetStderrDigest())
	if err != nil {
		return err
	}
	return x.lease.KeepOutput(ctx, stdout, stderr)
}
