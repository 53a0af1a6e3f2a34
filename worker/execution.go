package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/worker/outputs"
	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// execution is the work of one job between its lease and its response.
type execution struct {
	*job
	task *task
	meta *repb.ExecutedActionMetadata
	last time.Time // the latest time in meta
	// oomBefore is what the kernel had killed for want of memory before the command began.
	oomBefore uint64
}

// now returns the time for the next timestamp of the metadata. Timestamps never go back, also when
// clocks do (row EXO-21).
func (x *execution) now() *timestamppb.Timestamp { return x.at(time.Now()) }

func (x *execution) at(t time.Time) *timestamppb.Timestamp {
	if t.Before(x.last) {
		t = x.last
	}
	x.last = t
	return timestamppb.New(t)
}

// fetch reads and checks the action.
func (x *execution) fetch(ctx context.Context) (err error) {
	defer x.w.metrics.stage("fetch")()
	x.meta.QueuedTimestamp = x.at(x.spec.Queued)
	x.meta.WorkerStartTimestamp = x.at(x.started)
	x.meta.InputFetchStartTimestamp = x.now()
	ctx, cancel := context.WithTimeoutCause(ctx, x.w.cfg.FetchTimeout, errFetchTimeout)
	defer cancel()
	x.task, err = x.w.read(ctx, x.spec)
	return err
}

// execute lays the inputs out, runs the command, and takes its outputs. The error is for blame, or the
// farm's.
func (x *execution) execute(ctx context.Context) (*repb.ExecuteResponse, error) {
	if err := x.slot.Clean(); err != nil {
		return nil, setUp(ctx, err)
	}
	space, err := x.w.dirs.take(x.slot.UID())
	if err != nil {
		return nil, setUp(ctx, err)
	}
	x.space = space
	if err := x.layout(ctx); err != nil {
		return nil, err
	}
	x.meta.InputFetchCompletedTimestamp = x.now()
	defer x.w.logs.open(x.spec.Operation, x.lease.Attempt(), space)()
	ended, err := x.command(ctx)
	if err != nil {
		x.keepOutput(ctx)
		return nil, setUp(ctx, err)
	}
	x.ran = true
	if ended.ExitCode != 0 {
		// What the command could not write is no failure of its own.
		if err := x.w.dirs.lowDisk(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, x.w.cfg.UploadTimeout, errUploadTimeout)
	defer cancel()
	return x.result(ctx, ended)
}

func (x *execution) layout(ctx context.Context) error {
	defer x.w.metrics.stage("layout")()
	ctx, cancel := context.WithTimeoutCause(ctx, x.w.cfg.FetchTimeout, errFetchTimeout)
	defer cancel()
	to := x.task.layout(x.space.root())
	to.UID, to.Files, to.Copies = x.slot.UID(), x.w.cfg.Disk, !x.w.pool.Protects()
	return x.w.loader.Place(ctx, x.task.tree, to)
}

// command runs the action's command in the slot.
func (x *execution) command(ctx context.Context) (ended sandbox.Result, err error) {
	defer x.w.metrics.stage("run")()
	spec := sandbox.Spec{
		Root: x.space.root(), Dir: x.task.dir, Args: x.task.args, Env: x.task.env, Timeout: x.task.timeout,
		Scratch: x.space.tmp(), MaxOutput: x.w.cfg.MaxLog,
	}
	for name, file := range map[string]**os.File{x.space.stdout(): &spec.Stdout, x.space.stderr(): &spec.Stderr} {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return ended, err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		*file = f
	}
	x.meta.ExecutionStartTimestamp = x.now()
	x.oomBefore = x.w.oom.before()
	if ended, err = x.slot.Run(ctx, spec); err != nil {
		x.space.tainted = true
		return ended, err
	}
	x.meta.ExecutionStartTimestamp = x.at(ended.Started)
	x.meta.ExecutionCompletedTimestamp = x.at(ended.Started.Add(ended.Duration))
	x.meta.VirtualExecutionDuration = durationpb.New(ended.Duration)
	return ended, nil
}

// result collects, uploads and caches what the command made.
func (x *execution) result(ctx context.Context, ended sandbox.Result) (*repb.ExecuteResponse, error) {
	x.meta.OutputUploadStartTimestamp = x.now()
	made, refused, err := x.collect(ctx)
	if err != nil {
		return nil, err
	}
	defer made.Close() //nolint:errcheck // nothing was written
	if err := x.space.shut(); err != nil {
		return nil, err
	}
	x.release()
	uploaded := x.w.metrics.stage("upload")
	if err := x.w.collector.Upload(ctx, made); err != nil {
		return nil, err
	}
	uploaded()
	x.meta.OutputUploadCompletedTimestamp = x.now()
	x.meta.WorkerCompletedTimestamp = x.now()
	made.Result.ExitCode = int32(ended.ExitCode) //nolint:gosec // at most 255
	made.Result.ExecutionMetadata = x.meta
	response := &repb.ExecuteResponse{Result: made.Result, Status: &status.Status{}}
	x.classify(response, ended, refused)
	if x.outcome == outcomeExecuted && !x.spec.DoNotCache && !x.task.doNotCache && proto.Size(response) <= maxResponse {
		return response, x.cache(ctx, made.Result)
	}
	return response, nil
}

// classify says what the end of the command means.
func (x *execution) classify(response *repb.ExecuteResponse, ended sandbox.Result, refused error) {
	killed := ended.TimedOut || ended.Exceeded != ""
	if killed && ended.ExitCode == 0 {
		response.Result.ExitCode = 137
	}
	if !ended.TimedOut {
		response.Message = killText(ended, ended.ExitCode == exitKilled && x.w.oom.read() > x.oomBefore)
	}
	switch {
	case ended.TimedOut:
		x.outcome = outcomeTimeout
		response.Status = failure(code.Code_DEADLINE_EXCEEDED, timeoutMessage).Status
	case ended.Exceeded != "":
		x.outcome = outcomeFailed
	case refused != nil:
		x.outcome = outcomeRejected
		response.Status = blame(refused).GetStatus()
	case ended.ExitCode != 0:
		x.outcome = outcomeFailed
	default:
		x.outcome = outcomeExecuted
	}
}

// collect hashes the outputs. refused is what the client has to change about them, in which case there
// are only the standard output and error.
func (x *execution) collect(ctx context.Context) (made *outputs.Collection, refused, err error) {
	defer x.w.metrics.stage("collect")()
	space := x.spec.Action.Space()
	if err := x.space.restoreRoot(); err != nil {
		return nil, nil, err
	}
	made, err = x.w.collector.Collect(ctx, outputs.Source{
		Root: x.space.root(), UID: x.slot.UID(), Space: space, Outputs: x.task.outputs, Format: x.task.format,
	})
	if errors.Is(err, outputs.ErrRefused) {
		refused, err = err, nil
	}
	if err != nil {
		return nil, nil, err
	}
	err = errors.Join(
		made.Stdout(space, x.space.stdout(), x.w.cfg.MaxLog),
		made.Stderr(space, x.space.stderr(), x.w.cfg.MaxLog),
	)
	if err != nil {
		return nil, nil, errors.Join(err, made.Close())
	}
	return made, refused, nil
}

// cache stores a result. One that can't be stored is still a result, unless its blobs are gone.
func (x *execution) cache(ctx context.Context, result *repb.ActionResult) error {
	err := x.w.cfg.Actions.Put(ctx, x.spec.Action, result)
	if _, ok := errors.AsType[*actioncache.MissingError](err); ok {
		return fmt.Errorf("outputs vanished after their upload: %w", err)
	}
	if err != nil {
		x.w.cfg.Log.WarnContext(ctx, "result not cached", "operation", x.spec.Operation, "action", x.spec.Action, "err", err)
	}
	return nil
}
