package broker

import (
	"context"
	"fmt"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// MaxAttempts is how many attempts of an operation may fail for no fault of its action. Then it ends as
// UNAVAILABLE: an action that kills its worker must not go on to kill them all.
const MaxAttempts = 3

// Failure is an attempt that its worker gave back, or with which it died. A worker that was shut down
// in order has not failed.
type Failure struct {
	Worker string    `json:"worker"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

const (
	// maxReason bounds the reason of a failure, which travels with its operation.
	maxReason = 300
	// lostText is the reason of a worker that cannot give one.
	lostText = "the worker died or lost its connection"

	// shunFor is how long a job waits for a worker that it has not failed on while one serves its pool,
	// shunDelay how long the broker keeps it from all when the wrong one got it.
	shunFor   = time.Minute
	shunDelay = 500 * time.Millisecond
)

// fail notes the end of an attempt.
func (r *record) fail(worker, reason string, at time.Time) {
	r.Failures = append(r.Failures, Failure{Worker: worker, Reason: fmt.Sprintf("%.*s", maxReason, reason), At: at.UTC()})
}

// lose notes the attempt that nobody ended, when there is one.
func (r *record) lose() {
	if r.Stage == repb.ExecutionStage_EXECUTING {
		r.fail(r.Worker, lostText, time.Now())
	}
}

func (r *record) exhausted() bool { return len(r.Failures) >= MaxAttempts }

// epitaph is what the client of an exhausted operation is told.
func (r *record) epitaph() string {
	attempts := make([]string, len(r.Failures))
	for i, f := range r.Failures {
		attempts[i] = f.Worker + ": " + f.Reason
	}
	return fmt.Sprintf("all %d attempts failed for reasons of the farm, so the action is set aside (%s)", len(attempts), strings.Join(attempts, "; "))
}

// shuns tells whether a job that is delivered again should go to another worker, because an attempt of
// this one has failed. It asks for the record once, and only for such jobs.
func (q *Queue) shuns(ctx context.Context, job *record) bool {
	r, _, err := q.c.read(ctx, job.Operation)
	if err != nil || r.done() {
		return false // Begin finds out
	}
	failed := map[string]time.Time{}
	for _, f := range r.Failures {
		failed[f.Worker] = f.At
	}
	if r.Stage == repb.ExecutionStage_EXECUTING {
		failed[r.Worker] = r.Updated
	}
	at, own := failed[q.self.Name]
	if !own || time.Since(at) > shunFor+q.c.ackWait {
		return false
	}
	for _, w := range q.c.view.serving(r.Platform) {
		if _, known := failed[w.Name]; !known {
			return true
		}
	}
	return false
}
