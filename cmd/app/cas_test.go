package app_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cmd/app"
	"github.com/jetfarm/jetfarm/cmd/run"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// operator is a farm's storage and somebody who looks into it.
type operator struct {
	farm  *brokertest.Farm
	store *objectstore.Store
	space digest.Space
}

func newOperator(t *testing.T) *operator {
	t.Helper()
	o := &operator{farm: brokertest.Start(t), space: castest.Space(t, "")}
	nc := o.farm.Connect(t)
	var err error
	o.store, err = objectstore.Open(t.Context(), objectstore.Config{Small: nc, Bulk: nc, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *operator) put(t *testing.T, data []byte) digest.Digest {
	t.Helper()
	d, err := cas.PutBytes(t.Context(), o.store, o.space, data)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (o *operator) message(t *testing.T, m proto.Message) digest.Digest {
	t.Helper()
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return o.put(t, data)
}

// damage replaces the content of a small blob in the stream.
func (o *operator) damage(t *testing.T, d digest.Digest) {
	t.Helper()
	b, err := o.store.Stat(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	subject := "$O." + strings.TrimPrefix(b.Stream, "OBJ_") + ".C." + d.Hash()[:2] + "." + d.Space().Token() + "." + d.Hash() + "-" + strconv.FormatInt(d.Size(), 10)
	js, err := jetstream.New(o.farm.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), b.Stream)
	if err == nil {
		err = s.Purge(t.Context(), jetstream.WithPurgeSubject(subject))
	}
	if err == nil {
		_, err = js.Publish(t.Context(), subject, bytes.Repeat([]byte("x"), int(d.Size())))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// run runs a cas command on the farm.
func (o *operator) run(t *testing.T, args ...string) (out string, err error) {
	t.Helper()
	var stdout bytes.Buffer
	args = append([]string{"cas", args[0], "--nats", o.farm.URL()}, args[1:]...)
	err = app.Run(t.Context(), args, &stdout, io.Discard)
	return stdout.String(), err
}

func (o *operator) want(t *testing.T, want string, args ...string) {
	t.Helper()
	out, err := o.run(t, args...)
	if err != nil || out != want {
		t.Errorf("cas %v printed\n%s\nwant\n%s\nerror %v", args, out, want, err)
	}
}

// wantFail checks that a command fails with this text, and whether the usage is to blame.
func (o *operator) wantFail(t *testing.T, usage bool, text string, args ...string) string {
	t.Helper()
	out, err := o.run(t, args...)
	if err == nil || errors.As(err, new(run.UsageError)) != usage || !strings.Contains(err.Error(), text) {
		t.Errorf("cas %v: error %v, want %q, blaming the usage %t", args, err, text, usage)
	}
	return out
}

func short(d digest.Digest) string { return strings.TrimPrefix(d.Blob(), "blobs/") }

func TestCASPutGet(t *testing.T) {
	o, dir := newOperator(t), t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	for name, data := range map[string][]byte{"small": []byte("hello"), "large": bytes.Repeat([]byte("0123456789"), 200_000), "empty": nil} {
		if err := os.WriteFile(file(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		d := o.space.Of(data)
		o.want(t, short(d)+"\n", "put", file(name))
		o.want(t, short(d)+"\n", "put", file(name))
		for _, form := range []string{short(d), d.String(), d.Hash(), strings.ToUpper(d.Hash()), strings.ReplaceAll(short(d), "/", ":"), strings.ReplaceAll(short(d), "/", "-")} {
			o.want(t, string(data), "get", form)
		}
		o.want(t, "", "get", short(d), "-o", file("out"), "--force")
		got, err := os.ReadFile(file("out"))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes were written, error %v", name, len(got), err)
		}
		o.wantFail(t, true, "--force replaces it", "get", short(d), "-o", file("out"))
	}

	o.wantFail(t, false, "no such file", "put", file("nothing"))
	o.wantFail(t, true, "is a directory", "put", dir)
	o.wantFail(t, true, "none of", "put", file("small"), "--digest-function", "crc32")
	o.wantFail(t, true, "--instance", "put", file("small"), "--instance", "a/blobs/b")
	absent := o.space.Of([]byte("absent"))
	o.wantFail(t, false, "not found", "get", short(absent))
	o.wantFail(t, false, "not found", "get", absent.Hash())
	for _, bad := range []string{"xyz", absent.Hash() + "/", absent.Hash() + "/x", absent.Hash() + "/-1", "../../etc/passwd", "blobs/xyz/1", "\xff\x00"} {
		o.wantFail(t, true, "", "get", bad)
	}
	if err := os.Symlink(file("nowhere"), file("link")); err != nil {
		t.Fatal(err)
	}
	o.wantFail(t, true, "exists", "get", short(o.space.Of([]byte("hello"))), "-o", file("link"))

	// A damaged blob leaves nothing behind, neither the file nor a part of it.
	d := o.put(t, []byte("soon damaged"))
	o.damage(t, d)
	o.wantFail(t, false, "does not match", "get", short(d), "-o", file("damaged"))
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 5 {
		t.Errorf("%v is left in the directory, error %v", left, err)
	}
}

func TestCASListAndStat(t *testing.T) {
	o := newOperator(t)
	var all []string
	for i := range 300 {
		all = append(all, o.put(t, []byte(strconv.Itoa(i))).String())
	}
	large := o.put(t, make([]byte, 1<<20))
	o.space = castest.Space(t, "other/one")
	elsewhere := o.put(t, []byte("elsewhere"))
	lines := func(args ...string) []string {
		out, err := o.run(t, append([]string{"ls"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(out)
	}
	if n := len(lines()); n != len(all)+2 {
		t.Errorf("%d blobs are listed, want %d", n, len(all)+2)
	}
	if n := len(lines("--limit", "7")); n != 7 {
		t.Errorf("%d blobs are listed, want 7", n)
	}
	if got := lines("--instance", "other/one"); len(got) != 1 || got[0] != elsewhere.String() {
		t.Errorf("the other instance has %v", got)
	}
	if got := lines("--prefix", large.Hash()[:5]); len(got) != 1 || got[0] != large.String() {
		t.Errorf("the prefix of %v has %v", large, got)
	}
	for _, line := range lines("--json", "--instance=") {
		var b struct {
			Digest, Instance, Resource string
			Generation                 int
		}
		if err := json.Unmarshal([]byte(line), &b); err != nil || b.Generation != 1 || b.Instance != "" || b.Resource != "blobs/"+b.Digest {
			t.Fatalf("%s: error %v", line, err)
		}
	}
	o.space = castest.Space(t, "")
	o.wantFail(t, true, "not lower-case hex", "ls", "--prefix", "XY")
	o.wantFail(t, true, "negative", "ls", "--limit=-1")

	out, err := o.run(t, "stat", "--json")
	var u struct {
		Blobs       int              `json:"blobs"`
		Bytes       int              `json:"bytes"`
		Generations []map[string]any `json:"generations"`
	}
	if err != nil || json.Unmarshal([]byte(out), &u) != nil || u.Blobs != len(all)+2 || u.Bytes < 1<<20 || len(u.Generations) != 1 {
		t.Errorf("stat: %s, error %v", out, err)
	}
	if out, err := o.run(t, "stat", short(large)); err != nil || !strings.Contains(out, "present, 1.0 MiB, in generation 1, stream OBJ_cas-l-1-0") {
		t.Errorf("stat of a blob: %s, error %v", out, err)
	}
	o.wantFail(t, false, "not found", "stat", short(o.space.Of([]byte("absent"))))
}

func TestCASTree(t *testing.T) {
	o := newOperator(t)
	file := func(name, data string) *repb.FileNode {
		return &repb.FileNode{Name: name, Digest: o.put(t, []byte(data)).Proto(), IsExecutable: data == "run"}
	}
	of := func(data string) string { return short(o.space.Of([]byte(data))) }
	leaf := &repb.Directory{Files: []*repb.FileNode{file("deep", "deep")}}
	leafDigest := o.message(t, leaf)
	root := &repb.Directory{
		Files:       []*repb.FileNode{file("evil\x1b[2J\nname", "evil"), file("tool", "run")},
		Directories: []*repb.DirectoryNode{{Name: "sub", Digest: leafDigest.Proto()}},
		Symlinks:    []*repb.SymlinkNode{{Name: "link", Target: "tool"}},
	}
	rootDigest := o.message(t, root)
	top := "\"evil\\x1b[2J\\nname\"  " + of("evil") + "\ntool* " + of("run") + "\nlink -> tool\nsub/  " + short(leafDigest) + "\n"
	o.want(t, top+"sub/deep  "+of("deep")+"\n", "tree", short(rootDigest))
	o.want(t, top, "tree", short(rootDigest), "--depth", "1")
	o.wantFail(t, false, "more than 2 entries", "tree", short(rootDigest), "--limit", "2")
	tree := o.message(t, &repb.Tree{Root: root, Children: []*repb.Directory{leaf}})
	o.want(t, top+"sub/deep  "+of("deep")+"\n", "tree", short(tree))
	o.want(t, "", "tree", short(o.space.Of(nil)))

	command := o.message(t, &repb.Command{Arguments: []string{"cc", "-o", "a b"}, OutputPaths: []string{"out"}})
	action := o.message(t, &repb.Action{CommandDigest: command.Proto(), InputRootDigest: rootDigest.Proto()})
	if out, err := o.run(t, "tree", short(action)); err != nil || !strings.Contains(out, "input root  "+short(rootDigest)+"\n") {
		t.Errorf("an Action: %s, error %v", out, err)
	}
	if out, err := o.run(t, "tree", short(command)); err != nil || !strings.Contains(out, "argument    a b\noutput      out\n") {
		t.Errorf("a Command: %s, error %v", out, err)
	}
	o.wantFail(t, false, "is no Directory, Tree, Action or Command", "tree", short(o.put(t, []byte("some text that is no message"))))

	lacking := o.message(t, &repb.Directory{Directories: []*repb.DirectoryNode{
		{Name: "gone", Digest: o.space.Of([]byte("gone")).Proto()}, {Name: "sub", Digest: leafDigest.Proto()},
	}})
	out := o.wantFail(t, false, "1 directories can't be read", "tree", short(lacking))
	if !strings.Contains(out, "gone/  can't be read") || !strings.Contains(out, "sub/deep") {
		t.Errorf("a directory that lacks one printed\n%s", out)
	}
}

func TestCASVerify(t *testing.T) {
	o := newOperator(t)
	good, bad := o.put(t, []byte("good")), o.put(t, []byte("bad one"))
	large := o.put(t, make([]byte, 2<<20))
	o.want(t, "verified 3 blobs of 2.0 MiB; 0 damaged, 0 absent\n", "verify", "--all")
	o.damage(t, bad)
	if out := o.wantFail(t, false, "1 blobs were damaged", "verify", "--all", "-q", "--rate", "1GB"); !strings.Contains(out, "damaged "+bad.String()+"\n") {
		t.Errorf("verify printed\n%s", out)
	}
	o.want(t, "verified 2 blobs of 2.0 MiB; 0 damaged, 0 absent\n", "verify", "--all") // it was dropped
	o.wantFail(t, false, "1 blobs are absent", "verify", short(good), bad.Hash(), short(large))
	o.wantFail(t, true, "--all", "verify")
	o.wantFail(t, true, "--all", "verify", "--all", short(good))
}

func TestCASCollect(t *testing.T) {
	o := newOperator(t)
	o.wantFail(t, false, "no process rotates the generations", "gc")

	keeper, err := objectstore.Open(t.Context(), objectstore.Config{
		Small: o.farm.Connect(t), Bulk: o.farm.Connect(t), Log: slog.New(slog.DiscardHandler), Maintain: true, MaxSize: 64 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	var group errgroup.Group
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	group.Go(func() error { return keeper.Run(ctx) })
	defer func() {
		cancel(nil)
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	}()
	o.store = keeper
	stored := func() (n int64) {
		out, err := o.run(t, "stat", "--json")
		var u struct{ Bytes, Limit int64 }
		if err != nil || json.Unmarshal([]byte(out), &u) != nil {
			t.Fatalf("stat: %s, error %v", out, err)
		}
		return u.Bytes
	}
	// Each collection ends a generation, and those that are far behind the newest are old.
	for i, dropped := 0, false; !dropped; i++ {
		if i == 100 {
			t.Fatal("nothing is ever dropped")
		}
		blob := make([]byte, 4<<20) // of what does not compress
		rand.Read(blob)
		o.put(t, blob)
		before := stored()
		out, err := o.run(t, "gc")
		switch {
		case err == nil && strings.HasPrefix(out, "before: ") && strings.Contains(out, "\nafter:  "):
			dropped = stored() < before
		case err == nil || !strings.Contains(err.Error(), "no process rotates"): // the rotator may just have begun
			t.Fatalf("gc: %s, error %v", out, err)
		}
	}
	o.wantFail(t, false, "nothing more is old", "gc", "--to", "1B")
}

// TestCASNoFarm: nothing is made on a broker that belongs to no farm, and nobody waits for one.
func TestCASNoFarm(t *testing.T) {
	o := &operator{farm: brokertest.Start(t)}
	o.wantFail(t, false, "no blobs of a jetfarm farm", "stat")
	o.wantFail(t, false, "no blobs of a jetfarm farm", "ls")
	err := app.Run(t.Context(), []string{"cas", "stat", "--nats", "nats://127.0.0.1:1"}, io.Discard, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("no broker: error %v", err)
	}
}
