package actioncache_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixture struct {
	*actioncache.Cache
	nc     *nats.Conn
	memory *castest.Memory
	store  *castest.Faulty
	space  digest.Space
	calls  [3]atomic.Int64 // of Open, Put, Missing
}

func start(t testing.TB, change ...func(*actioncache.Config)) *fixture {
	t.Helper()
	x := &fixture{memory: castest.NewMemory(), space: castest.Space(t, "ac/test")}
	x.store = &castest.Faulty{Store: x.memory}
	x.nc = brokertest.Start(t).Connect(t)
	cfg := actioncache.Config{Conn: x.nc, Blobs: x.store, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	for _, f := range change {
		f(&cfg)
	}
	c, err := actioncache.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	x.Cache = c
	x.count()
	return x
}

func (x *fixture) count() {
	x.store.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
		x.calls[map[castest.Op]int{castest.OpOpen: 0, castest.OpPut: 1, castest.OpMissing: 2}[op]].Add(1)
		return castest.Fault{}
	}
}

func (x *fixture) blob(t testing.TB, data []byte) *repb.Digest {
	t.Helper()
	d, err := cas.PutBytes(t.Context(), x.memory, x.space, data)
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

func (x *fixture) message(t testing.TB, m proto.Message) *repb.Digest {
	t.Helper()
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return x.blob(t, data)
}

func (x *fixture) parse(t testing.TB, d *repb.Digest) digest.Digest {
	t.Helper()
	p, err := x.space.Parse(d)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (x *fixture) put(t testing.TB, action digest.Digest, result *repb.ActionResult) {
	t.Helper()
	if err := x.Put(t.Context(), action, result); err != nil {
		t.Fatalf("Put: %v", err)
	}
}

func (x *fixture) want(t testing.TB, action digest.Digest, want *repb.ActionResult) {
	t.Helper()
	got, err := x.Get(t.Context(), action)
	if err != nil {
		t.Fatalf("Get: %v", err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Fatalf("Get (-want +got):\n%s", diff)
	}
}

func (x *fixture) wantNone(t testing.TB, action digest.Digest) {
	t.Helper()
	if r, err := x.Get(t.Context(), action); !errors.Is(err, actioncache.ErrNotFound) {
		t.Fatalf("Get: %v, error %v, want ErrNotFound", r, err)
	}
}

// full is a result with a blob of every kind, and the blobs by name.
func (x *fixture) full(t testing.TB) (*repb.ActionResult, map[string]digest.Digest) {
	t.Helper()
	blobs := make(map[string]digest.Digest)
	blob := func(name string) *repb.Digest {
		d := x.blob(t, []byte(name))
		blobs[name] = x.parse(t, d)
		return d
	}
	message := func(name string, m proto.Message) *repb.Digest {
		d := x.message(t, m)
		blobs[name] = x.parse(t, d)
		return d
	}
	dir := func(prefix string) (leaf, root *repb.Directory) {
		leaf = &repb.Directory{Files: []*repb.FileNode{{Name: "deep", Digest: blob(prefix + " deep file")}}}
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(leaf)
		if err != nil {
			t.Fatal(err)
		}
		root = &repb.Directory{
			Files:       []*repb.FileNode{{Name: "top", Digest: blob(prefix + " top file")}},
			Directories: []*repb.DirectoryNode{{Name: "leaf", Digest: x.space.Of(data).Proto()}},
			Symlinks:    []*repb.SymlinkNode{{Name: "link", Target: "top"}},
		}
		return leaf, root
	}
	treeLeaf, treeRoot := dir("tree")
	bothLeaf, bothRoot := dir("both")
	walkLeaf, walkRoot := dir("walk")
	message("both leaf", bothLeaf)
	message("walk leaf", walkLeaf)
	result := &repb.ActionResult{
		OutputFiles: []*repb.OutputFile{
			{Path: "a/b.o", Digest: blob("file"), IsExecutable: true},
			{Path: "a/empty", Digest: x.space.Of(nil).Proto()},
		},
		OutputSymlinks:     []*repb.OutputSymlink{{Path: "l", Target: "a/b.o"}},
		OutputFileSymlinks: []*repb.OutputSymlink{{Path: "l", Target: "a/b.o"}}, //nolint:staticcheck // Clients still send it.
		OutputDirectories: []*repb.OutputDirectory{
			{Path: "tree", TreeDigest: message("tree", &repb.Tree{Root: treeRoot, Children: []*repb.Directory{treeLeaf}})},
			{
				Path:                "both",
				TreeDigest:          message("both tree", &repb.Tree{Root: bothRoot, Children: []*repb.Directory{bothLeaf}}),
				RootDirectoryDigest: message("both root", bothRoot),
			},
			{Path: "walk", RootDirectoryDigest: message("walk root", walkRoot)},
		},
		ExitCode:          3,
		StdoutDigest:      blob("stdout"),
		StderrDigest:      blob("stderr"),
		ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"},
	}
	return result, blobs
}

func action(x *fixture, name string) digest.Digest { return x.space.Of([]byte(name)) }

func TestPutGet(t *testing.T) {
	x := start(t)
	a := action(x, "a")
	x.wantNone(t, a) // row ACG-1
	up := &repb.ActionResult{OutputSymlinks: []*repb.OutputSymlink{{Path: "../sibling", Target: "x"}}}
	x.put(t, action(x, "up"), up)
	x.want(t, action(x, "up"), up)
	result, _ := x.full(t)
	x.put(t, a, result)
	x.want(t, a, result)
	x.want(t, a, result)
	other := &repb.ActionResult{ExitCode: 1, StdoutDigest: result.GetStdoutDigest()}
	x.put(t, a, other) // row ACU-9
	x.want(t, a, other)
	x.put(t, action(x, "nothing"), &repb.ActionResult{})
	x.want(t, action(x, "nothing"), &repb.ActionResult{})
}

// TestSpaces is rows ACG-10 and GEN-7.
func TestSpaces(t *testing.T) {
	x := start(t)
	result := &repb.ActionResult{ExitCode: 7}
	instances := []string{"", "a", "a.b", "*", "a/>", strings.Repeat("x", digest.MaxInstance)}
	for i, instance := range instances {
		x.put(t, castest.Space(t, instance).Of([]byte("a")), result)
		for j, other := range instances {
			d := castest.Space(t, other).Of([]byte("a"))
			if j <= i {
				x.want(t, d, result)
			} else {
				x.wantNone(t, d)
			}
		}
	}
}

// TestIncompleteResult is row ACG-2: each blob by itself makes the result unusable while it is
// absent, and the same result can't be stored.
func TestIncompleteResult(t *testing.T) {
	x := start(t)
	a := action(x, "a")
	result, blobs := x.full(t)
	x.put(t, a, result)
	if len(blobs) != 15 {
		t.Errorf("the result names %d blobs", len(blobs))
	}
	for name, d := range blobs {
		data, err := cas.ReadAll(t.Context(), x.memory, d, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		x.memory.Remove(d)
		if _, err := x.Get(t.Context(), a); !errors.Is(err, actioncache.ErrNotFound) {
			t.Errorf("without %s: Get: error %v, want ErrNotFound", name, err)
		}
		var missing *actioncache.MissingError
		if err := x.Put(t.Context(), action(x, "b"), result); !errors.As(err, &missing) {
			t.Errorf("without %s: Put: error %v, want a MissingError", name, err)
		} else if len(missing.Missing) != 1 || missing.Missing[0] != d {
			t.Errorf("without %s: missing %v, want %v", name, missing.Missing, d)
		}
		x.wantNone(t, action(x, "b"))
		x.memory.Corrupt(d, data)
		x.want(t, a, result)
	}
}

func TestOneQuestion(t *testing.T) {
	x := start(t)
	result, _ := x.full(t)
	x.put(t, action(x, "a"), result)
	x.calls[2].Store(0)
	x.want(t, action(x, "a"), result)
	if n := x.calls[2].Load(); n != 1 {
		t.Errorf("%d calls of Missing, want 1", n)
	}
}

// TestStorageFails is row ACG-4: what can't be told is not a miss, and nothing is deleted for it.
func TestStorageFails(t *testing.T) {
	x := start(t)
	a := action(x, "a")
	result, blobs := x.full(t)
	x.put(t, a, result)
	stop := errors.New("the test ended this context")
	for _, op := range []castest.Op{castest.OpOpen, castest.OpMissing} {
		for name, test := range map[string]struct {
			fault castest.Fault
			want  error
		}{
			"error":      {castest.Fault{After: -1, Err: cas.ErrUnavailable}, cas.ErrUnavailable},
			"late error": {castest.Fault{After: 10, Err: cas.ErrUnavailable}, cas.ErrUnavailable},
			"stall":      {castest.Fault{After: 10, Stall: true}, stop},
		} {
			x.store.Plan = func(o castest.Op, d digest.Digest) castest.Fault {
				if o == op && (op == castest.OpMissing || d == blobs["tree"] || d == blobs["walk root"]) {
					return test.fault
				}
				return castest.Fault{}
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, stop)
			_, err := x.Get(ctx, a)
			cancel()
			if !errors.Is(err, test.want) || errors.Is(err, actioncache.ErrNotFound) {
				t.Errorf("%s of %s: error %v, want %v", name, op, err, test.want)
			}
		}
	}
	for name, fault := range map[string]castest.Fault{"truncated": {After: 10, Truncate: true}, "wrong": {After: 1, Lie: true}} {
		x.store.Plan = func(_ castest.Op, d digest.Digest) castest.Fault {
			if d == blobs["tree"] {
				return fault
			}
			return castest.Fault{}
		}
		if _, err := x.Get(t.Context(), a); !errors.Is(err, actioncache.ErrNotFound) {
			t.Errorf("%s Tree: error %v, want ErrNotFound", name, err)
		}
	}
	x.store.Plan = nil
	x.want(t, a, result)
}

func TestBrokerGone(t *testing.T) {
	x := start(t)
	x.put(t, action(x, "a"), &repb.ActionResult{})
	x.nc.Close()
	if _, err := x.Get(t.Context(), action(x, "a")); !errors.Is(err, cas.ErrUnavailable) {
		t.Errorf("Get: error %v, want ErrUnavailable", err)
	}
	if err := x.Put(t.Context(), action(x, "a"), &repb.ActionResult{}); !errors.Is(err, cas.ErrUnavailable) {
		t.Errorf("Put: error %v, want ErrUnavailable", err)
	}
	stop := errors.New("the test ended this context")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if _, err := x.Get(ctx, action(x, "a")); !errors.Is(err, stop) {
		t.Errorf("Get with a done context: error %v", err)
	}
}

// TestBytesAreMoved is rows ACU-6 and ACG-5.
func TestBytesAreMoved(t *testing.T) {
	x := start(t)
	a := action(x, "a")
	result := &repb.ActionResult{
		StdoutRaw: []byte("out"), StderrRaw: []byte("err"),
		OutputFiles: []*repb.OutputFile{{Path: "f", Contents: []byte("file")}},
	}
	before := proto.CloneOf(result)
	x.put(t, a, result)
	if diff := cmp.Diff(before, result, protocmp.Transform()); diff != "" {
		t.Errorf("Put has changed its argument:\n%s", diff)
	}
	x.want(t, a, &repb.ActionResult{
		StdoutDigest: x.space.Of([]byte("out")).Proto(), StderrDigest: x.space.Of([]byte("err")).Proto(),
		OutputFiles: []*repb.OutputFile{{Path: "f", Digest: x.space.Of([]byte("file")).Proto()}},
	})
	for _, data := range []string{"out", "err", "file"} {
		got, err := cas.ReadAll(t.Context(), x.memory, x.space.Of([]byte(data)), 10)
		if err != nil || string(got) != data {
			t.Errorf("%s is not in the CAS: %v", data, err)
		}
	}
}

// TestInvalidResult is rows ACU-2 and ACU-8.
func TestInvalidResult(t *testing.T) {
	x := start(t)
	d := x.blob(t, []byte("data"))
	file := func(path string) *repb.ActionResult {
		return &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: path, Digest: d}}}
	}
	links := func(ls ...*repb.OutputSymlink) *repb.ActionResult { return &repb.ActionResult{OutputSymlinks: ls} }
	for name, r := range map[string]*repb.ActionResult{
		"nil": nil, "empty path": file(""), "absolute": file("/a"),
		"slash at the end": file("a/"), "zero byte": file("a\x00b"),
		"null file":     {OutputFiles: []*repb.OutputFile{nil}},
		"no digest":     {OutputFiles: []*repb.OutputFile{{Path: "a"}}},
		"negative size": {OutputFiles: []*repb.OutputFile{{Path: "a", Digest: &repb.Digest{Hash: d.GetHash(), SizeBytes: -1}}}},
		"same path":     {OutputFiles: []*repb.OutputFile{{Path: "a", Digest: d}, {Path: "a", Digest: d}}},
		"file and link": {OutputFiles: []*repb.OutputFile{{Path: "a", Digest: d}}, OutputSymlinks: []*repb.OutputSymlink{{Path: "a", Target: "b"}}},
		"no target":     links(&repb.OutputSymlink{Path: "a"}),
		"null link":     links(nil),
		"bad stderr":    {StderrDigest: &repb.Digest{Hash: "zz"}},
		"raw differs":   {StdoutRaw: []byte("other"), StdoutDigest: d},
		"raw size":      {StdoutRaw: []byte("data"), StdoutDigest: &repb.Digest{Hash: d.GetHash(), SizeBytes: 5}},
		"file differs":  {OutputFiles: []*repb.OutputFile{{Path: "a", Digest: d, Contents: []byte("other")}}},
		"two roots":     {OutputDirectories: []*repb.OutputDirectory{{TreeDigest: d}, {TreeDigest: d}}},
	} {
		if err := x.Put(t.Context(), action(x, name), r); !errors.Is(err, actioncache.ErrInvalid) {
			t.Errorf("%s: error %v, want ErrInvalid", name, err)
		}
		x.wantNone(t, action(x, name))
	}
}

// confirming is a store whose Missing has forgotten everything and whose Confirm has not.
type confirming struct{ *castest.Memory }

func (confirming) Missing(_ context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return ds, nil
}

func (c confirming) Confirm(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return c.Memory.Missing(ctx, ds)
}

func TestConfirmIsAsked(t *testing.T) {
	memory := castest.NewMemory()
	x := start(t, func(cfg *actioncache.Config) { cfg.Blobs = confirming{memory} })
	x.memory = memory
	result, _ := x.full(t)
	x.put(t, action(x, "a"), result)
	x.want(t, action(x, "a"), result)
}

// TestOpenAgain: any number of processes open the bucket, and what is there stays.
func TestOpenAgain(t *testing.T) {
	x := start(t)
	x.put(t, action(x, "a"), &repb.ActionResult{ExitCode: 1})
	for _, size := range []int64{0, 0, 2 << 30} {
		c, err := actioncache.Open(t.Context(), actioncache.Config{Conn: x.nc, Blobs: x.store, MaxBytes: size, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatalf("Open: %v", err)
		}
		if _, err := c.Get(t.Context(), action(x, "a")); err != nil {
			t.Errorf("Get: %v", err)
		}
	}
}

// TestOldestEntriesGiveWay is the bound on the bucket and row ACG-12.
func TestOldestEntriesGiveWay(t *testing.T) {
	x := start(t, func(cfg *actioncache.Config) {
		cfg.MaxBytes = 1 << 20
		cfg.Refresh = time.Nanosecond
	})
	worker := bytes.Repeat([]byte("w"), 10_000)
	result := &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: string(worker)}}
	x.put(t, action(x, "used"), result)
	x.put(t, action(x, "unused"), result)
	for i := range 300 {
		x.put(t, x.space.Of([]byte{byte(i), byte(i >> 8)}), result)
		x.want(t, action(x, "used"), result)
	}
	x.wantNone(t, action(x, "unused"))
}

// TestSmallBroker: a broker without room for the usual bucket gets a smaller one.
func TestSmallBroker(t *testing.T) {
	s, err := broker.StartServer(t.Context(), broker.ServerConfig{Dir: t.TempDir(), MaxStore: 300 << 20, Listen: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	nc, err := broker.Connect(t.Context(), broker.ConnectConfig{Servers: []string{s.URL()}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	if _, err := actioncache.Open(t.Context(), actioncache.Config{Conn: nc, Blobs: castest.NewMemory(), Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Errorf("Open on a broker with 300 MiB: %v", err)
	}
}
