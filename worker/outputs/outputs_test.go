package outputs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/worker/outputs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type rig struct {
	t         testing.TB
	space     digest.Space
	store     *castest.Memory
	collector *outputs.Collector
	root      string
	uid       int
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, store: castest.NewMemory(), root: filepath.Join(t.TempDir(), "root"), uid: -1}
	if os.Geteuid() == 0 {
		r.uid = 57999
	}
	if err := os.Mkdir(r.root, 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.space, err = digest.SpaceOf("", repb.DigestFunction_SHA256, ""); err != nil {
		t.Fatal(err)
	}
	tier, err := disk.Open(t.Context(), disk.Config{Dir: filepath.Join(t.TempDir(), "tier"), MaxBytes: 1 << 30, Source: r.store, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tier.Close() })
	r.collector = &outputs.Collector{Blobs: r.store, Files: tier, Limits: outputs.DefaultLimits()}
	return r
}

func (r *rig) write(name, content string, mode os.FileMode) {
	r.t.Helper()
	path := filepath.Join(r.root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		r.t.Fatal(err)
	}
	err := os.WriteFile(path, []byte(content), 0o600)
	if err := errors.Join(err, os.Chmod(path, mode), os.Lchown(path, r.uid, r.uid)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) link(name, target string) {
	r.t.Helper()
	path := filepath.Join(r.root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(target, path)); err != nil {
		r.t.Fatal(err)
	}
}

// collect collects and uploads what c names.
func (r *rig) collect(c *repb.Command) (*repb.ActionResult, error) {
	r.t.Helper()
	asked, err := outputs.Of(c)
	if err != nil {
		r.t.Fatal(err)
	}
	made, err := r.collector.Collect(r.t.Context(), outputs.Source{
		Root: r.root, UID: r.uid, Space: r.space, Outputs: asked, Format: c.GetOutputDirectoryFormat(),
	})
	if made == nil {
		return nil, err
	}
	defer made.Close()
	return made.Result, errors.Join(err, r.collector.Upload(r.t.Context(), made))
}

func (r *rig) ok(c *repb.Command) *repb.ActionResult {
	r.t.Helper()
	res, err := r.collect(c)
	if err != nil {
		r.t.Fatal(err)
	}
	return res
}

func (r *rig) blob(d *repb.Digest) []byte {
	r.t.Helper()
	parsed, err := r.space.Parse(d)
	if err != nil {
		r.t.Fatal(err)
	}
	data, err := cas.ReadAll(r.t.Context(), r.store, parsed, 1<<26)
	if err != nil {
		r.t.Fatal(err)
	}
	return data
}

func paths(p ...string) *repb.Command { return &repb.Command{OutputPaths: p} }

func TestKindsOfOutputs(t *testing.T) {
	r := newRig(t)
	r.write("f", "content", 0o644)
	r.write("x", "content", 0o711)
	r.write("closed", "secret", 0)
	r.write("d/f", "in d", 0o640)
	r.link("lf", "f")
	r.link("ld", "d")
	r.link("dangling", "../nowhere")
	r.link("abs", "/etc")
	res := r.ok(paths("f", "x", "closed", "d", "lf", "ld", "dangling", "abs", "none", "f/below", "lf/below", "f"))
	var got []string
	for _, f := range res.GetOutputFiles() {
		got = append(got, fmt.Sprintf("%s %v %s", f.GetPath(), f.GetIsExecutable(), r.blob(f.GetDigest())))
	}
	if want := []string{"f false content", "x true content", "closed false secret"}; !slices.Equal(got, want) {
		t.Errorf("files are %q, want %q", got, want)
	}
	list := func(links []*repb.OutputSymlink) string {
		var s []string
		for _, l := range links {
			s = append(s, l.GetPath()+">"+l.GetTarget())
		}
		return strings.Join(s, " ")
	}
	if got, want := list(res.GetOutputSymlinks()), "lf>f ld>d dangling>../nowhere abs>/etc"; got != want {
		t.Errorf("links are %s, want %s", got, want)
	}
	if got, want := list(res.GetOutputFileSymlinks()), "lf>f dangling>../nowhere abs>/etc"; got != want { //nolint:staticcheck // clients of REAPI 2.0 use these fields
		t.Errorf("file links are %s, want %s", got, want)
	}
	if got, want := list(res.GetOutputDirectorySymlinks()), "ld>d"; got != want { //nolint:staticcheck // clients of REAPI 2.0 use these fields
		t.Errorf("directory links are %s, want %s", got, want)
	}
	if len(res.GetOutputDirectories()) != 1 || res.GetOutputDirectories()[0].GetPath() != "d" {
		t.Errorf("directories are %v", res.GetOutputDirectories())
	}
}

func TestNothingOutsideTheRootIsRead(t *testing.T) {
	r := newRig(t)
	secret := filepath.Join(filepath.Dir(r.root), "secret")
	if err := errors.Join(os.Mkdir(secret, 0o755), os.WriteFile(filepath.Join(secret, "f"), []byte("secret"), 0o644)); err != nil {
		t.Fatal(err)
	}
	r.link("relative", "../secret")
	r.link("absolute", secret)
	r.link("d/in", "../../secret")
	res := r.ok(paths("relative/f", "absolute/f", "d/in/f", "d"))
	if len(res.GetOutputFiles()) != 0 || len(res.GetOutputDirectories()) != 1 {
		t.Errorf("result is %v", res)
	}
	if r.uid < 0 {
		return
	}
	// A hard link to a file that the action can't read.
	closed := filepath.Join(secret, "closed")
	if err := errors.Join(os.WriteFile(closed, []byte("root's"), 0o600), os.Link(closed, filepath.Join(r.root, "stolen"))); err != nil {
		t.Fatal(err)
	}
	if _, err := r.collect(paths("stolen")); !errors.Is(err, outputs.ErrRefused) {
		t.Errorf("error is %v", err)
	}
}

func TestSpecialFilesAndLimitsAreRefused(t *testing.T) {
	r := newRig(t)
	r.collector.Limits = outputs.Limits{Nodes: 100, Bytes: 1 << 20, Depth: 10, Names: 1 << 20}
	fifo := filepath.Join(r.root, "fifo/pipe")
	if err := errors.Join(os.Mkdir(filepath.Dir(fifo), 0o755), syscall.Mkfifo(fifo, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(r.root, "deep", strings.Repeat("d/", 12)), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 101 {
		r.write(fmt.Sprintf("many/%d", i), "", 0o644)
	}
	r.write("sparse", "", 0o644)
	if err := os.Truncate(filepath.Join(r.root, "sparse"), 1<<40); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"fifo": `"fifo/pipe" is a named pipe`, "fifo/pipe": "named pipe", "deep": "inside one another", "many": "100 files", "sparse": "1048576 bytes",
	} {
		res, err := r.collect(paths(path))
		if !errors.Is(err, outputs.ErrRefused) || !strings.Contains(err.Error(), want) || res == nil || len(res.GetOutputFiles()) != 0 {
			t.Errorf("%s: error is %v, want %q", path, err, want)
		}
	}
}

func TestEmptyDirectoryIsATreeOfTwoBytes(t *testing.T) {
	r := newRig(t)
	if err := os.Mkdir(filepath.Join(r.root, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	d := r.ok(paths("d")).GetOutputDirectories()[0]
	if got := r.blob(d.GetTreeDigest()); !bytes.Equal(got, []byte{0x0a, 0}) || d.GetRootDirectoryDigest() != nil {
		t.Errorf("tree is %x, %v", got, d)
	}
}

func TestWholeWorkingDirectory(t *testing.T) {
	r := newRig(t)
	r.write("wd/f", "x", 0o644)
	r.write("g", "y", 0o644)
	res := r.ok(&repb.Command{WorkingDirectory: "wd", OutputPaths: []string{"", "../g"}})
	if len(res.GetOutputDirectories()) != 1 || res.GetOutputDirectories()[0].GetPath() != "" || res.GetOutputFiles()[0].GetPath() != "../g" {
		t.Errorf("result is %v", res)
	}
}

// fill makes a random tree that repeats itself.
func (r *rig) fill(rng *rand.Rand, at string, depth int) {
	if err := os.MkdirAll(filepath.Join(r.root, at), 0o755); err != nil {
		r.t.Fatal(err)
	}
	for i := range rng.IntN(5) {
		name := fmt.Sprintf("%s/%c%d", at, 'a'+rng.IntN(4), i)
		switch k := rng.IntN(4); {
		case k == 0:
			r.write(name, strings.Repeat("x", rng.IntN(3)), 0o644)
		case k == 1:
			r.link(name, "target")
		case depth > 0:
			r.fill(rng, name, depth-1)
		}
	}
}

func TestTreesAreTopologicallySortedToTheByte(t *testing.T) {
	r := newRig(t)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		at := fmt.Sprintf("tree%d", i)
		r.fill(rng, at, 5)
		c := paths(at)
		c.OutputDirectoryFormat = repb.Command_TREE_AND_DIRECTORY
		d := r.ok(c).GetOutputDirectories()[0]
		data := r.blob(d.GetTreeDigest())
		var tree repb.Tree
		if err := proto.Unmarshal(data, &tree); err != nil {
			t.Fatal(err)
		}
		if !d.GetIsTopologicallySorted() {
			t.Fatal("not marked as sorted")
		}
		r.checkTree(data, d.GetRootDirectoryDigest())
		r.checkContent(&tree, filepath.Join(r.root, at))
	}
}

// checkTree checks the records of a Tree as REAPI describes them for is_topologically_sorted.
func (r *rig) checkTree(data []byte, root *repb.Digest) {
	r.t.Helper()
	referred := map[string]bool{}
	seen := map[string]bool{}
	for first := true; len(data) > 0; first = false {
		tag := byte(0x12)
		if first {
			tag = 0x0a
		}
		if data[0] != tag {
			r.t.Fatalf("tag is %#x, want %#x", data[0], tag)
		}
		size, n := binary.Uvarint(data[1:])
		if n <= 0 {
			r.t.Fatal("size is not a varint")
		}
		body := data[1+n : 1+n+int(size)]
		data = data[1+n+int(size):]
		d := r.space.Of(body)
		switch {
		case seen[d.Hash()]:
			r.t.Fatalf("%v is there twice", d)
		case first && d.Hash() != root.GetHash():
			r.t.Fatalf("root is %v, want %v", d, root)
		case !first && !referred[d.Hash()]:
			r.t.Fatalf("%v comes before its parents or has none", d)
		}
		seen[d.Hash()] = true
		var dir repb.Directory
		if err := proto.Unmarshal(body, &dir); err != nil {
			r.t.Fatal(err)
		}
		if !bytes.Equal(r.blob(d.Proto()), body) {
			r.t.Fatalf("directory %v is not uploaded", d)
		}
		for _, sub := range dir.GetDirectories() {
			if seen[sub.GetDigest().GetHash()] {
				r.t.Fatalf("%v comes before its parent", sub)
			}
			referred[sub.GetDigest().GetHash()] = true
		}
	}
	for hash := range referred {
		if !seen[hash] {
			r.t.Fatalf("%s is not in the tree", hash)
		}
	}
}

// checkContent compares a Tree with what is on disk.
func (r *rig) checkContent(tree *repb.Tree, dir string) {
	r.t.Helper()
	known := map[string]*repb.Directory{}
	for _, c := range tree.GetChildren() {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
		if err != nil {
			r.t.Fatal(err)
		}
		known[r.space.Of(data).Hash()] = c
	}
	var check func(m *repb.Directory, dir string)
	check = func(m *repb.Directory, dir string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			r.t.Fatal(err)
		}
		if len(entries) != len(m.GetFiles())+len(m.GetDirectories())+len(m.GetSymlinks()) {
			r.t.Fatalf("%s has %d entries, the tree %v", dir, len(entries), m)
		}
		for _, f := range m.GetFiles() {
			b, err := os.ReadFile(filepath.Join(dir, f.GetName()))
			if err != nil || r.space.Of(b).Hash() != f.GetDigest().GetHash() {
				r.t.Fatalf("%s/%s: %v", dir, f.GetName(), err)
			}
		}
		for _, l := range m.GetSymlinks() {
			if to, err := os.Readlink(filepath.Join(dir, l.GetName())); err != nil || to != l.GetTarget() {
				r.t.Fatalf("%s/%s leads to %q, %v", dir, l.GetName(), to, err)
			}
		}
		for _, d := range m.GetDirectories() {
			check(known[d.GetDigest().GetHash()], filepath.Join(dir, d.GetName()))
		}
	}
	check(tree.GetRoot(), dir)
}

func TestAdoptedOutputIsNobodysToWrite(t *testing.T) {
	r := newRig(t)
	r.write("out", "adopted", 0o777)
	res := r.ok(paths("out"))
	info, err := os.Stat(filepath.Join(r.root, "out"))
	if err != nil || info.Mode().Perm() != 0o555 {
		t.Errorf("mode is %v, %v", info, err)
	}
	if st := info.Sys().(*syscall.Stat_t); r.uid >= 0 && (st.Uid != 0 || st.Nlink != 2) {
		t.Errorf("owner is %d with %d links", st.Uid, st.Nlink)
	}
	if got := r.blob(res.GetOutputFiles()[0].GetDigest()); string(got) != "adopted" {
		t.Errorf("content is %q", got)
	}
}

func TestFileThatIsStillOpenForWritingIsNotAdopted(t *testing.T) {
	r := newRig(t)
	if r.uid < 0 {
		t.Skip("needs root")
	}
	r.write("out", "content", 0o644)
	f, err := os.OpenFile(filepath.Join(r.root, "out"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r.ok(paths("out"))
	info, err := f.Stat()
	if err != nil || info.Sys().(*syscall.Stat_t).Nlink != 1 {
		t.Errorf("the file is shared with the tier: %v, %v", info, err)
	}
}
