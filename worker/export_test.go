package worker

import (
	"context"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Execute runs an action as a job does, but without a lease.
func (w *Worker) Execute(ctx context.Context, action digest.Digest) (*repb.ExecuteResponse, error) {
	slot, err := w.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	j := &job{w: w, spec: &broker.Job{Action: action, Queued: now, DoNotCache: true}, slot: slot, started: now}
	defer j.release()
	x := &execution{job: j, meta: &repb.ExecutedActionMetadata{Worker: w.cfg.Name}}
	if err := x.fetch(ctx); err != nil {
		return nil, err
	}
	return x.execute(ctx)
}
