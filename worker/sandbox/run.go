package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// Spec is a command and where it runs.
type Spec struct {
	// Root is the execution root on the host. It and its directories belong to the slot's user.
	Root string
	// Dir is the working directory, slash-separated and relative to Root; "" is Root itself.
	Dir string
	// Args is the command line. The executable is Args[0]: an absolute path, a path relative to the
	// working directory if it has a slash, else a name that is looked for in PATH of Env.
	Args []string
	// Env is the whole environment, as name=value. Only PATH is added when it has none, and TMPDIR
	// when it has none and /tmp is not private.
	Env []string
	// Scratch is an empty directory of the slot's user outside Root for temporary files.
	Scratch string
	// Stdout and Stderr are open for appending.
	Stdout, Stderr *os.File
	// Timeout is how long the command may run; 0 is without end.
	Timeout time.Duration
	// MaxOutput bounds each of Stdout and Stderr in bytes; 0 is without bound.
	MaxOutput int64
}

// Result is how a command ended.
type Result struct {
	// ExitCode is the status as a shell says it: 128 plus the signal for a command that a signal ended.
	ExitCode int
	// Signal is what ended the command, or 0 for one that ended by itself, as the shell around a command
	// does that a signal ended.
	Signal syscall.Signal
	// TimedOut says that the command was killed because of Spec.Timeout.
	TimedOut bool
	// Exceeded says which limit other than the timeout the command exceeded, or is "". The command was
	// killed for it unless it ended sooner.
	Exceeded string
	// Started is when the command began, Duration how long it ran by the monotonic clock, which is also
	// what the timeout counts.
	Started  time.Time
	Duration time.Duration
}

// SpawnError reports a command that can't be started because of what it is.
type SpawnError struct {
	// Path is the executable that was tried, or the name that was not found.
	Path string
	Err  error
}

func (e *SpawnError) Error() string { return fmt.Sprintf("can't start %q: %v", e.Path, e.Err) }

// Unwrap returns the system's error.
func (e *SpawnError) Unwrap() error { return e.Err }

// exceededError marks the cause of a kill that is the command's own fault.
type exceededError string

func (e exceededError) Error() string { return string(e) }

// errTimeout marks the end of Spec.Timeout.
var errTimeout = errors.New("execution timeout")

// execution is the state that the goroutine which waits for the command and the one which watches it
// share.
type execution struct {
	spec    Spec
	running chan struct{} // closed when the command runs
	ended   chan struct{} // closed when nothing is to be watched any more
	mu      sync.Mutex    // guards why
	why     error         // why the command was killed
	started time.Time
	family  *family // used by one goroutine at a time; nil where users are killed
}

// Run runs a command until it ends, the timeout is over or ctx ends, and returns when all of its
// processes are dead. The error is nil for any command that ran by itself, whatever its exit code,
// a *SpawnError for one that can't, context.Cause(ctx) when ctx ended first; every other error is the
// worker's trouble.
func (s *Slot) Run(ctx context.Context, spec Spec) (Result, error) {
	if err := context.Cause(ctx); err != nil {
		return Result{}, err
	}
	if s.dirty {
		if err := s.sweep(nil); err != nil {
			return Result{}, err
		}
		s.dirty = false
	}
	e := &execution{spec: spec, running: make(chan struct{}), ended: make(chan struct{})}
	var g errgroup.Group
	g.Go(func() error { s.watch(ctx, e); return nil })
	var code, pid int
	var signal syscall.Signal
	var duration time.Duration
	err := onThread(func() (err error) {
		proc, err := s.start(spec)
		if err != nil {
			return err
		}
		pid = proc.Pid
		e.started = time.Now()
		if s.uid < 0 {
			e.family = newFamily(spec, pid)
		}
		close(e.running)
		state, err := proc.Wait()
		duration = time.Since(e.started)
		if err != nil {
			return fmt.Errorf("wait for the command: %w", err)
		}
		code, signal = exitCode(state)
		return nil
	})
	close(e.ended)
	if err := errors.Join(err, g.Wait()); err != nil && pid == 0 {
		return Result{}, err
	}
	if pid != 0 {
		if swept := s.sweep(e.family); swept != nil {
			s.dirty = true
			return Result{}, errors.Join(err, swept)
		}
	}
	if err != nil {
		return Result{}, err
	}
	r := Result{ExitCode: code, Signal: signal, Started: e.started, Duration: duration}
	why := e.killed()
	if why == nil {
		why = e.overLimit() // between the last look and the end
	}
	switch {
	case why == nil:
	case errors.Is(why, errTimeout):
		r.TimedOut = true
	default:
		exceeded, ok := errors.AsType[exceededError](why)
		if !ok {
			return Result{}, why
		}
		r.Exceeded = string(exceeded)
	}
	return r, nil
}

func (e *execution) killed() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.why
}

// watchEvery is how often the size of the output is looked at, killEvery how often a kill is repeated.
const (
	watchEvery = 100 * time.Millisecond
	killEvery  = 50 * time.Millisecond
)

// watch kills the command when it has to end, and returns when it has ended.
func (s *Slot) watch(ctx context.Context, e *execution) {
	select {
	case <-e.running:
	case <-e.ended:
		return
	}
	var timeout <-chan time.Time
	if e.spec.Timeout > 0 {
		timer := time.NewTimer(e.spec.Timeout)
		defer timer.Stop()
		timeout = timer.C
	}
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	why := error(nil)
	for why == nil {
		select {
		case <-e.ended:
			return
		case <-ctx.Done():
			why = context.Cause(ctx)
		case <-timeout:
			why = errTimeout
		case <-tick.C:
			why = e.overLimit()
			if e.family != nil {
				e.family.find()
			}
		}
	}
	e.mu.Lock()
	e.why = why
	e.mu.Unlock()
	again := time.NewTicker(killEvery)
	defer again.Stop()
	for {
		if err := s.kill(e.family); err != nil {
			s.pool.log.WarnContext(ctx, "kill the processes of an action", "err", err)
		}
		select {
		case <-e.ended:
			return
		case <-again.C:
		}
	}
}

func (e *execution) overLimit() error {
	if e.spec.MaxOutput <= 0 {
		return nil
	}
	for _, f := range []struct {
		name string
		file *os.File
	}{{"standard output", e.spec.Stdout}, {"standard error", e.spec.Stderr}} {
		if info, err := f.file.Stat(); err == nil && info.Size() > e.spec.MaxOutput {
			return exceededError(fmt.Sprintf("%s exceeds the limit of %d bytes", f.name, e.spec.MaxOutput))
		}
	}
	return nil
}

// kill sends SIGKILL to all processes of the running command.
func (s *Slot) kill(f *family) error {
	if s.uid >= 0 {
		return killUID(s.uid, s.pool.killer())
	}
	f.kill()
	return nil
}

// sweep kills all processes of the slot, waits for their end, and removes what they left outside their
// own directories.
func (s *Slot) sweep(f *family) error {
	if s.uid < 0 {
		if f == nil {
			return nil
		}
		return f.sweep()
	}
	err := sweepUID(s.uid, s.pool.killer())
	if err == nil && s.pool.mode == ModeUID {
		err = removeLitter(s.uid)
	}
	return err
}
