package worker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// A worker whose machine is in trouble fails job after job, faster than healthy workers finish theirs, and
// would use up the attempts of a whole queue. So it takes itself out of the farm, says why, tries by
// itself whether it works again, and comes back when it does.
//
// What fails everywhere at once, such as a storage that does not answer, is no such trouble: a farm whose
// workers have all left serves nobody.

const (
	// maxOwnFailures is how many jobs in a row may fail for the worker's own reasons.
	maxOwnFailures = 3
	// The pause before a probe, which doubles until jobs succeed again.
	firstProbePause = time.Second
	maxProbePause   = time.Minute
	// probeBytes is what a probe writes.
	probeBytes = 1 << 20
	// A disk with less room is full: below minFree bytes, or a fiftieth on small ones, or minInodes.
	minFree     = 128 << 20
	minFreePart = 50
	minInodes   = 1000
)

var (
	// errSetUp marks what failed on the way to or from a command, on this machine.
	errSetUp      = errors.New("the worker can't set up actions")
	errOutOfOrder = errors.New("the worker is out of order")
	// errLowDisk reports a file system that has no room for actions.
	errLowDisk = errors.New("the disk is full")
	// errStuck reports a job that goes on although it was told to end.
	errStuck = errors.New("a job can't be ended")
)

// health counts what a worker fails at.
type health struct {
	queue   *broker.Queue
	metrics *metrics

	mu       sync.Mutex
	failures int                     // guarded by mu; jobs in a row
	rounds   int                     // guarded by mu; how often it was out since a job succeeded
	stuckNow int                     // guarded by mu; jobs that can't be ended
	trouble  string                  // guarded by mu; why it is out, or ""
	stop     context.CancelCauseFunc // guarded by mu; ends what waits for a job, or nil
}

// succeeded notes a job that the worker was able to run.
func (h *health) succeeded() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failures, h.rounds = 0, 0
}

// failed notes a job that failed for the worker's own reasons, and takes it out when there were too many.
func (h *health) failed(ctx context.Context, err error) {
	h.mu.Lock()
	h.failures++
	n := h.failures
	h.mu.Unlock()
	h.metrics.ownFailures.Inc()
	if n >= maxOwnFailures || isDiskFull(err) {
		h.leave(ctx, err.Error())
	}
}

// leave makes the worker take no more jobs.
func (h *health) leave(ctx context.Context, why string) {
	h.mu.Lock()
	first := h.trouble == ""
	if first {
		h.trouble = why
		h.rounds++
		if h.stop != nil {
			h.stop(errOutOfOrder)
		}
	}
	h.mu.Unlock()
	if first {
		h.metrics.outOfOrder.Set(1)
		h.queue.SetTrouble(ctx, why)
	}
}

// stuck notes a job that goes on although it was told to end, and takes the worker out as long as it does:
// what does not answer one job will not answer the next.
func (h *health) stuck(ctx context.Context, operation string) {
	h.mu.Lock()
	h.stuckNow++
	h.mu.Unlock()
	h.leave(ctx, fmt.Sprintf("%v: operation %s", errStuck, operation))
}

// unstuck notes that one of them has ended after all.
func (h *health) unstuck() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stuckNow--
}

func (h *health) isStuck() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stuckNow > 0
}

// back makes it take jobs again. The next failure of its own takes it out at once.
func (h *health) back(ctx context.Context) {
	h.mu.Lock()
	h.trouble, h.failures = "", maxOwnFailures-1
	h.mu.Unlock()
	h.metrics.outOfOrder.Set(0)
	h.queue.SetTrouble(ctx, "")
}

// pause is how long to wait for the next probe after so many of this round, or 0 when the worker is well.
func (h *health) pause(probes int) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.trouble == "" {
		return 0
	}
	return min(maxProbePause, firstProbePause<<min(probes+h.rounds-1, 10))
}

// whileWell returns a context that also ends when the worker leaves. It is for one at a time.
func (h *health) whileWell(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stop = cancel
	if h.trouble != "" {
		cancel(errOutOfOrder)
	}
	return ctx, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.stop = nil
		cancel(errFinished)
	}
}

// next returns the next job for a slot. A worker that is out of order first waits until it works again.
func (w *Worker) next(ctx context.Context, slot *sandbox.Slot) (*broker.Lease, error) {
	for {
		if err := w.dirs.lowDisk(); err != nil {
			w.health.leave(ctx, err.Error())
		}
		if err := w.recover(ctx, slot); err != nil {
			return nil, err
		}
		looking, stop := w.health.whileWell(ctx)
		lease, err := w.cfg.Queue.Next(looking)
		left := looking.Err() != nil && ctx.Err() == nil
		stop()
		if err == nil || !left {
			return lease, err
		}
	}
}

// recover returns when the worker is well, which it finds out with the slot.
func (w *Worker) recover(ctx context.Context, slot *sandbox.Slot) error {
	for probes := 0; ; probes++ {
		pause := w.health.pause(probes)
		if pause == 0 {
			return nil
		}
		timer := time.NewTimer(pause/2 + rand.N(pause/2)) //nolint:gosec // spreads probes
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
		if err := w.probe(slot); err != nil {
			w.cfg.Log.WarnContext(ctx, "the worker is still out of order", "err", err)
			continue
		}
		w.health.back(ctx)
	}
}

// probe does what jobs need to be done on this machine: room, a workspace, the sandbox.
func (w *Worker) probe(slot *sandbox.Slot) (err error) {
	if w.health.isStuck() {
		return errStuck
	}
	if err := w.dirs.lowDisk(); err != nil {
		return err
	}
	if err := slot.Clean(); err != nil {
		return err
	}
	space, err := w.dirs.take(slot.UID())
	if err != nil {
		return err
	}
	space.tainted = true // nothing of a probe stays
	defer w.dirs.give(space)
	f, err := os.OpenFile(filepath.Join(space.base, "probe"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, probeBytes))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return slot.Probe(w.dirs.run)
}

// lowDisk returns errLowDisk when there is no room for actions.
func (d *dirs) lowDisk() error {
	var s unix.Statfs_t
	if err := unix.Statfs(d.run, &s); err != nil {
		return fmt.Errorf("look for room in %s: %w", d.run, err)
	}
	size := uint64(s.Bsize) //nolint:gosec // a block size is positive
	free, total := s.Bavail*size, s.Blocks*size
	switch {
	case free < min(minFree, total/minFreePart):
		return fmt.Errorf("%w: %d MiB of %d MiB are free at %s", errLowDisk, free>>20, total>>20, d.run)
	case s.Files > minFreePart*minInodes && s.Ffree < minInodes:
		return fmt.Errorf("%w: %d of %d inodes are free at %s", errLowDisk, s.Ffree, s.Files, d.run)
	}
	return nil
}

func isDiskFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, errLowDisk)
}

// isOwn tells whether a job failed because of this machine.
func isOwn(err error) bool {
	var network *net.OpError
	switch {
	case isDiskFull(err):
		return true
	case isOutage(err), errors.Is(err, cas.ErrFull),
		errors.Is(err, errFetchTimeout), errors.Is(err, errUploadTimeout), errors.As(err, &network):
		return false
	}
	_, system := errors.AsType[syscall.Errno](err)
	return system || errors.Is(err, errSetUp)
}

// setUp marks an error of this machine, unless ctx ended meanwhile or the command is to blame.
func setUp(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || blame(err) != nil {
		return err
	}
	return fmt.Errorf("%w: %w", errSetUp, err)
}
