package worker_test

import (
	"context"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker"
)

// stuckStore is a storage that does not answer, whatever becomes of the caller's context, until it is free.
type stuckStore struct {
	cas.Store
	op   castest.Op
	free chan struct{}
}

func (s *stuckStore) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if s.op == castest.OpOpen {
		<-s.free
	}
	return s.Store.Open(ctx, d, offset)
}

func (s *stuckStore) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	if s.op == castest.OpPut {
		<-s.free
	}
	return s.Store.Put(ctx, d, r)
}

// TestX_118_ActionThatIsStuck: an action that hangs on its worker, which goes on beating, runs on another
// one. The worker can't end the job and is out of order until it has ended.
func TestX_118_ActionThatIsStuck(t *testing.T) {
	t.Parallel()
	for _, op := range []castest.Op{castest.OpOpen, castest.OpPut} {
		t.Run(string(op), func(t *testing.T) {
			t.Parallel()
			f := newFarmWith(t, broker.Config{Reconcile: 100 * time.Millisecond, MendAfter: 200 * time.Millisecond, AckWait: time.Second})
			d := f.store(sh("echo made"))
			action, err := cas.ReadAll(t.Context(), f.blobs, d, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			store := &stuckStore{Store: f.blobs, op: op, free: make(chan struct{})}
			hangs := f.worker("auto", func(c *worker.Config) {
				c.Blobs, c.Concurrency = store, 1
				c.FetchTimeout, c.UploadTimeout, c.DefaultTimeout, c.Grace = time.Second, time.Second, 3*time.Second, 100*time.Millisecond
			})
			name := f.submit(broker.Request{Action: d, ActionData: action})
			f.executing(name)
			works := f.worker("auto", nil)
			r := f.wait(name)
			if by := r.GetResult().GetExecutionMetadata().GetWorker(); statusCode(r) != code.Code_OK || by != "worker-"+filepath.Base(works.dir) {
				t.Errorf("the response is %v", r)
			}
			ended, err := f.client.Get(t.Context(), name)
			if err != nil || len(ended.Failures) != 1 || ended.Failures[0].Worker != "worker-"+filepath.Base(hangs.dir) {
				t.Errorf("the operation is %+v, %v", ended, err)
			}
			until(t, "the worker is out", func() bool { return strings.Contains(f.trouble(hangs), "a job can't be ended") })
			for range 3 {
				f.ok(sh("true"))
			}
			close(store.free)
			within(t, "the end of the trouble", 30*time.Second, func() bool { return f.trouble(hangs) == "" })
			works.stop()
			if by := f.ok(sh("echo again")).GetExecutionMetadata().GetWorker(); by != "worker-"+filepath.Base(hangs.dir) {
				t.Errorf("the worker is %s", by)
			}
			until(t, "nothing is left", func() bool { return f.broker.Messages(t, "JOBS")+f.broker.Messages(t, "FLIGHTS") == 0 })
		})
	}
}
