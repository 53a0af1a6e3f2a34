package worker_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/worker"
)

// crashPoints are the subjects to which a worker writes at the end of an action with a small and a large
// output, in this order: blobs, result, record, flight, job.
var crashPoints = []string{
	"$O.cas-s-1-0.M.", "$O.cas-s-1-0.C.", "$O.cas-l-1-0.C.", "$O.cas-l-1-0.M.", "$KV.ac-1.",
	"jetfarm.op.", "$JS.API.STREAM.MSG.DELETE.FLIGHTS", "$JS.ACK.",
}

// TestWorkerIsCutAtAMessage: the connections of a worker are cut at any message that it stores something
// with, before or after it has arrived. Whether the worker is dead by that or comes back, the operation ends
// once and well, and nothing is left.
func TestWorkerIsCutAtAMessage(t *testing.T) {
	t.Parallel()
	for _, subject := range crashPoints {
		for _, after := range []bool{false, true} {
			for _, returns := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s after=%t returns=%t", subject, after, returns), func(t *testing.T) {
					t.Parallel()
					cutWorker(t, subject, after, returns)
				})
			}
		}
	}
}

func cutWorker(t *testing.T, subject string, after, returns bool) {
	t.Helper()
	f := newFarmWith(t, broker.Config{Reconcile: 100 * time.Millisecond, MendAfter: 300 * time.Millisecond, AckWait: 2 * time.Second})
	cutter := f.broker.Cutter(t)
	if returns {
		cutter.Survive()
	}
	cut := f.cutWorker(cutter, returns)
	gate := filepath.Join(openDir(t), "gate")
	d := f.store(sh("until test -e "+gate+"; do sleep 0.02; done; seq 200000 >large; mkdir dir; echo small >dir/small; echo out").outputs("large", "dir"))
	name := f.submit(broker.Request{Action: d})
	ends := f.ends(name)
	f.executing(name)
	cutter.Arm(subject, after)
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	<-cutter.Cut()
	workers := []*running{cut}
	if !returns {
		workers = append(workers, f.worker("none", one))
	}
	r := f.wait(name)
	if statusCode(r) != code.Code_OK || r.GetResult().GetExitCode() != 0 || len(r.GetResult().GetOutputFiles()) != 1 {
		t.Errorf("the response is %v", r)
	}
	f.complete("the response", r.GetResult())
	until(t, "nothing is left", func() bool { return f.broker.Messages(t, "JOBS")+f.broker.Messages(t, "FLIGHTS") == 0 })
	for _, w := range workers {
		w.stop()
		for _, dir := range []string{"run", "trash"} {
			if entries, err := os.ReadDir(filepath.Join(w.dir, "actions", dir)); err != nil || len(entries) != 0 {
				t.Errorf("%s of %s has %v left (%v)", dir, w.dir, entries, err)
			}
		}
	}
	if n := ends(); n != 1 {
		t.Errorf("the operation has ended %d times", n)
	}
	// A result that could not be stored is still one.
	f.cached(d, subject == "$KV.ac-1." && returns)
	op, err := f.client.Get(t.Context(), name)
	if err != nil || len(op.Failures) > 1 || op.Attempt > 2 {
		t.Errorf("the operation is %+v, %v", op, err)
	}
}

// cutWorker starts a worker all of whose connections pass a cutter. One that does not return renews no lease,
// so that the only acknowledgement is that of the end.
func (f *farm) cutWorker(cutter *brokertest.Cutter, returns bool) *running {
	f.t.Helper()
	client := cutter.Client(f.t, f.broker, broker.Config{AckWait: 2 * time.Second})
	nc := cutter.Connect(f.t, f.broker)
	store, err := objectstore.Open(f.t.Context(), objectstore.Config{Small: nc, Bulk: cutter.Connect(f.t, f.broker), Log: f.log})
	if err != nil {
		f.t.Fatal(err)
	}
	cache, err := actioncache.Open(f.t.Context(), actioncache.Config{Conn: nc, Blobs: store, Log: f.log})
	if err != nil {
		f.t.Fatal(err)
	}
	return f.worker("none", func(c *worker.Config) {
		c.Blobs, c.Actions, c.Concurrency, c.DrainTimeout = store, cache, 1, 100*time.Millisecond
		self := broker.WorkerInfo{Name: c.Name, Slots: 1}
		if c.Queue = client.Queue(self); returns {
			c.Queue = brokertest.Queue(f.t, client, self)
		}
	})
}

// ends counts the terminal states of an operation from now on.
func (f *farm) ends(operation string) (count func() int) {
	f.t.Helper()
	var mu sync.Mutex
	n := 0
	nc := f.broker.Connect(f.t)
	_, err := nc.Subscribe("jetfarm.status."+operation, func(m *nats.Msg) {
		line, _, _ := strings.Cut(string(m.Data), "\n")
		var state struct{ Stage repb.ExecutionStage_Value }
		if m.Reply == "" && json.Unmarshal([]byte(line), &state) == nil && state.Stage == repb.ExecutionStage_COMPLETED {
			mu.Lock()
			defer mu.Unlock()
			n++
		}
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return n
	}
}

// complete checks that the storage has every blob of a result.
func (f *farm) complete(what string, r *repb.ActionResult) {
	f.t.Helper()
	var need []digest.Digest
	add := func(d *repb.Digest) {
		parsed, err := f.space.Parse(d)
		if err != nil {
			f.t.Fatal(err)
		}
		need = append(need, parsed)
	}
	for _, file := range r.GetOutputFiles() {
		add(file.GetDigest())
	}
	for _, dir := range r.GetOutputDirectories() {
		add(dir.GetTreeDigest())
		tree := &repb.Tree{}
		if err := proto.Unmarshal([]byte(f.blob(dir.GetTreeDigest())), tree); err != nil {
			f.t.Fatal(err)
		}
		for _, d := range append(tree.GetChildren(), tree.GetRoot()) {
			for _, file := range d.GetFiles() {
				add(file.GetDigest())
			}
		}
	}
	add(r.GetStdoutDigest())
	for _, d := range need { // reads them, since an index of what is there can be wrong
		if _, err := cas.ReadAll(f.t.Context(), f.blobs, d, 1<<26); err != nil {
			f.t.Errorf("%s names %s: %v", what, d.Blob(), err)
		}
	}
}

// cached checks that what the action cache has stored of an action is complete, and that it has something.
func (f *farm) cached(action digest.Digest, mayBeAbsent bool) {
	f.t.Helper()
	js, err := jetstream.New(f.broker.Connect(f.t))
	if err != nil {
		f.t.Fatal(err)
	}
	kv, err := js.KeyValue(f.t.Context(), "ac-1")
	if err != nil {
		f.t.Fatal(err)
	}
	entry, err := kv.Get(f.t.Context(), fmt.Sprintf("%s.%s.%d", action.Space().Token(), action.Hash(), action.Size()))
	if mayBeAbsent && errors.Is(err, jetstream.ErrKeyNotFound) {
		return
	}
	if err != nil {
		f.t.Fatalf("the result is not cached: %v", err)
	}
	r := &repb.ActionResult{}
	if v := entry.Value(); len(v) < 2 || v[0] != 1 || proto.Unmarshal(v[1:], r) != nil {
		f.t.Errorf("the entry is %q", v)
	}
	f.complete("the action cache", r)
}
