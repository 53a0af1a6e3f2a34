package worker_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// isolations are the modes that the user of the test can have.
func isolations() []string {
	if os.Geteuid() != 0 {
		return []string{"none"}
	}
	if !mayMount() {
		return []string{"uid", "none"}
	}
	return []string{"namespaces", "uid", "none"}
}

// mayMount tells whether the test may have namespaces: root of a container often may not.
func mayMount() bool { return exec.Command("unshare", "--mount", "--ipc", "true").Run() == nil } //nolint:noctx // ends at once

func inEveryIsolation(t *testing.T, f func(f *farm, isolation string)) {
	t.Helper()
	for _, i := range isolations() {
		t.Run(i, func(t *testing.T) { f(newFarm(t), i) })
	}
}

// farm is a broker with a storage, to which a test adds workers.
type farm struct {
	t      testing.TB
	broker *brokertest.Farm
	client *broker.Client
	blobs  *castest.Faulty
	cache  *actioncache.Cache
	log    *slog.Logger
	space  digest.Space
}

func newFarm(t testing.TB) *farm {
	t.Helper()
	return newFarmWith(t, broker.Config{})
}

func newFarmWith(t testing.TB, cfg broker.Config) *farm {
	t.Helper()
	f := &farm{t: t, broker: brokertest.Start(t), log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	f.client = f.broker.ClientWith(t, cfg)
	nc := f.broker.Connect(t)
	store, err := objectstore.Open(t.Context(), objectstore.Config{Small: nc, Bulk: nc, Log: f.log})
	if err != nil {
		t.Fatal(err)
	}
	f.blobs = &castest.Faulty{Store: store}
	if f.cache, err = actioncache.Open(t.Context(), actioncache.Config{Conn: nc, Blobs: store, Log: f.log}); err != nil {
		t.Fatal(err)
	}
	if f.space, err = digest.SpaceOf("main", repb.DigestFunction_SHA256, ""); err != nil {
		t.Fatal(err)
	}
	return f
}

// openDir is a directory that every user can reach, unlike those of t.TempDir.
func openDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "worker-test-*") //nolint:usetesting // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// running is a worker of a farm.
type running struct {
	*worker.Worker
	dir  string
	tier *disk.Tier
	stop func()
}

// worker starts a worker that runs until the test's end or its stop is called.
func (f *farm) worker(isolation string, change func(*worker.Config)) *running {
	f.t.Helper()
	return f.workerIn(openDir(f.t), isolation, change)
}

func (f *farm) workerIn(dir, isolation string, change func(*worker.Config)) *running {
	f.t.Helper()
	tier, err := disk.Open(f.t.Context(), disk.Config{
		Dir: filepath.Join(dir, "cache"), MaxBytes: 1 << 30, Source: f.blobs, Log: f.log,
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = tier.Close() })
	cfg := worker.Config{
		Name: "worker-" + filepath.Base(dir), Dir: filepath.Join(dir, "actions"), Concurrency: 2, Isolation: isolation,
		DrainTimeout: 5 * time.Second, Blobs: f.blobs, Disk: tier, Actions: f.cache, Log: f.log,
	}
	if change != nil {
		change(&cfg)
	}
	if cfg.Queue == nil {
		cfg.Queue = brokertest.Queue(f.t, f.client, broker.WorkerInfo{Name: cfg.Name, Slots: 2, Isolation: isolation})
	}
	w, err := worker.New(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(f.t.Context()))
	var g errgroup.Group
	g.Go(func() error { return w.Run(ctx) })
	r := &running{Worker: w, dir: dir, tier: tier}
	r.stop = func() {
		cancel(nil)
		if err := g.Wait(); err != nil {
			f.t.Errorf("Run: %v", err)
		}
	}
	f.t.Cleanup(r.stop)
	return r
}

// action is what a test asks for; its fields may be changed before it is stored.
type action struct {
	files    map[string]string // content by path; one that starts with "#!" is executable
	links    map[string]string // targets by path
	dirs     []string          // empty directories
	command  *repb.Command
	action   *repb.Action
	withhold map[string]bool // file contents, "command", or "root", that are not uploaded
}

func sh(script string) *action {
	return &action{
		command: &repb.Command{
			Arguments:            []string{"/bin/sh", "-c", script},
			EnvironmentVariables: []*repb.Command_EnvironmentVariable{{Name: "PATH", Value: "/usr/bin:/bin"}},
		},
		action: &repb.Action{},
	}
}

func (a *action) outputs(paths ...string) *action {
	a.command.OutputPaths = paths
	return a
}

func (f *farm) put(m proto.Message, withhold bool) *repb.Digest {
	f.t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		f.t.Fatal(err)
	}
	return f.putBytes(data, withhold)
}

func (f *farm) putBytes(data []byte, withhold bool) *repb.Digest {
	f.t.Helper()
	d := f.space.Of(data)
	if !withhold {
		if err := f.blobs.Put(f.t.Context(), d, bytes.NewReader(data)); err != nil {
			f.t.Fatal(err)
		}
	}
	return d.Proto()
}

// store uploads an action with all it needs and returns its digest.
func (f *farm) store(a *action) digest.Digest {
	f.t.Helper()
	if a.action.GetCommandDigest() == nil {
		a.action.CommandDigest = f.put(a.command, a.withhold["command"])
	}
	if a.action.GetInputRootDigest() == nil {
		a.action.InputRootDigest = f.directory(a, "")
	}
	d, err := f.space.Parse(f.put(a.action, false))
	if err != nil {
		f.t.Fatal(err)
	}
	return d
}

// directory uploads what a has below the directory at prefix, which is "" or ends in a slash.
func (f *farm) directory(a *action, prefix string) *repb.Digest {
	f.t.Helper()
	m := &repb.Directory{}
	subs := map[string]bool{}
	each := func(name string, leaf func(base string)) {
		rest, ok := strings.CutPrefix(name, prefix)
		if !ok {
			return
		}
		if dir, _, below := strings.Cut(rest, "/"); below {
			subs[dir] = true
		} else {
			leaf(rest)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(a.files)) {
		each(name, func(base string) {
			content := a.files[name]
			m.Files = append(m.Files, &repb.FileNode{
				Name: base, Digest: f.putBytes([]byte(content), a.withhold[content]), IsExecutable: strings.HasPrefix(content, "#!"),
			})
		})
	}
	for _, name := range slices.Sorted(maps.Keys(a.links)) {
		each(name, func(base string) {
			m.Symlinks = append(m.Symlinks, &repb.SymlinkNode{Name: base, Target: a.links[name]})
		})
	}
	for _, name := range a.dirs {
		each(name, func(base string) { subs[base] = true })
	}
	for _, name := range slices.Sorted(maps.Keys(subs)) {
		m.Directories = append(m.Directories, &repb.DirectoryNode{Name: name, Digest: f.directory(a, path.Join(prefix, name)+"/")})
	}
	return f.put(m, a.withhold["root"] && prefix == "")
}

// submit queues a stored action.
func (f *farm) submit(r broker.Request) string {
	f.t.Helper()
	name, err := f.client.Submit(f.t.Context(), r)
	if err != nil {
		f.t.Fatal(err)
	}
	return name
}

// wait returns the response of an operation.
func (f *farm) wait(operation string) *repb.ExecuteResponse {
	f.t.Helper()
	ctx, cancel := context.WithTimeoutCause(f.t.Context(), 60*time.Second, errors.New("the operation did not end in time"))
	defer cancel()
	for op, err := range f.client.Watch(ctx, operation) {
		if err != nil {
			f.t.Fatal(err)
		}
		if !op.Done() {
			continue
		}
		data := op.Response
		if !op.ResponseBlob.IsZero() {
			if data, err = cas.ReadAll(ctx, f.blobs, op.ResponseBlob, 8<<20); err != nil {
				f.t.Fatal(err)
			}
		}
		r := &repb.ExecuteResponse{}
		if err := proto.Unmarshal(data, r); err != nil {
			f.t.Fatal(err)
		}
		return r
	}
	f.t.Fatal("the operation never ended")
	return nil
}

// stage waits until an operation is in the stage EXECUTING.
func (f *farm) executing(operation string) {
	f.t.Helper()
	for op, err := range f.client.Watch(f.t.Context(), operation) {
		if err != nil {
			f.t.Fatal(err)
		}
		if op.Stage == repb.ExecutionStage_EXECUTING {
			return
		}
	}
	f.t.Fatal("the operation was never executed")
}

// run stores, submits and waits.
func (f *farm) run(a *action) *repb.ExecuteResponse {
	f.t.Helper()
	return f.wait(f.submit(broker.Request{Action: f.store(a), DoNotCache: a.action.GetDoNotCache()}))
}

// ok is run for an action whose status has to be OK.
func (f *farm) ok(a *action) *repb.ActionResult {
	f.t.Helper()
	r := f.run(a)
	if r.GetStatus().GetCode() != int32(code.Code_OK) {
		f.t.Fatalf("status is %v", r.GetStatus())
	}
	return r.GetResult()
}

// blob returns the content of a digest of a result.
func (f *farm) blob(d *repb.Digest) string {
	f.t.Helper()
	parsed, err := f.space.Parse(d)
	if err != nil {
		f.t.Fatal(err)
	}
	data, err := cas.ReadAll(f.t.Context(), f.blobs, parsed, 1<<26)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(data)
}

func statusCode(r *repb.ExecuteResponse) code.Code { return code.Code(r.GetStatus().GetCode()) }

// marked counts the living processes that have marker in their command line.
func marked(t testing.TB, marker string) int {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), marker) {
			n++
		}
	}
	return n
}

// stallReads makes the storage answer no read any more.
func (f *farm) stallReads() {
	f.blobs.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
		return castest.Fault{After: -1, Stall: op == castest.OpOpen}
	}
}
