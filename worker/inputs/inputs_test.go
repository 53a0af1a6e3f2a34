package inputs_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/worker/inputs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a store with a tier on top.
type rig struct {
	t     testing.TB
	space digest.Space
	store *castest.Memory
	tier  *disk.Tier
	dir   string
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, store: castest.NewMemory(), dir: t.TempDir()}
	var err error
	if r.space, err = digest.SpaceOf("", repb.DigestFunction_SHA256, ""); err != nil {
		t.Fatal(err)
	}
	r.tier, err = disk.Open(t.Context(), disk.Config{
		Dir: filepath.Join(r.dir, "tier"), MaxBytes: 1 << 30, Source: r.store, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.tier.Close() })
	return r
}

func (r *rig) bytes(data string) digest.Digest {
	r.t.Helper()
	d, err := cas.PutBytes(r.t.Context(), r.store, r.space, []byte(data))
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

func (r *rig) put(m *repb.Directory) digest.Digest {
	r.t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.bytes(string(data))
}

func (r *rig) loader() *inputs.Loader { return inputs.NewLoader(r.tier, inputs.DefaultLimits()) }

// chain is a directory with depth directories inside one another, each with width equal children.
func (r *rig) chain(depth, width int) digest.Digest {
	d := r.put(&repb.Directory{Files: []*repb.FileNode{{Name: "leaf", Digest: r.bytes("leaf").Proto()}}})
	for range depth {
		m := &repb.Directory{}
		for i := range width {
			m.Directories = append(m.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("%02d", i), Digest: d.Proto()})
		}
		d = r.put(m)
	}
	return d
}

func TestTreesBeyondTheLimitsAreRefused(t *testing.T) {
	r := newRig(t)
	big, err := r.space.New(strings.Repeat("ab", 32), 1<<62)
	if err != nil {
		t.Fatal(err)
	}
	long := &repb.Directory{}
	for name, c := range map[string]struct {
		root digest.Digest
		want string
	}{
		"few directories that make a huge tree": {r.chain(40, 20), "entries"},
		"depth":                                 {r.chain(600, 1), "depth"},
		"bytes": {r.put(&repb.Directory{Files: []*repb.FileNode{
			{Name: "a", Digest: big.Proto()}, {Name: "b", Digest: big.Proto()}, {Name: "c", Digest: big.Proto()},
		}}), "bytes"},
		"path": {func() digest.Digest {
			d := r.put(long)
			for range 20 {
				d = r.put(&repb.Directory{Directories: []*repb.DirectoryNode{{Name: strings.Repeat("n", 255), Digest: d.Proto()}}})
			}
			return d
		}(), "paths"},
	} {
		_, err := r.loader().Load(t.Context(), c.root)
		if !errors.Is(err, inputs.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	if _, err := r.loader().Load(t.Context(), r.chain(3, 20)); err != nil {
		t.Errorf("a tree of 8000 directories: %v", err)
	}
}

func TestLookupAndObstacle(t *testing.T) {
	r := newRig(t)
	sub := r.put(&repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: r.bytes("x").Proto()}}})
	root := r.put(&repb.Directory{
		Directories: []*repb.DirectoryNode{{Name: "d", Digest: sub.Proto()}},
		Symlinks:    []*repb.SymlinkNode{{Name: "l", Target: "d"}},
	})
	tree, err := r.loader().Load(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]inputs.Kind{
		"": inputs.Directory, "d": inputs.Directory, "d/f": inputs.File, "l": inputs.Symlink,
		"x": inputs.Absent, "d/f/x": inputs.Absent, "l/f": inputs.Absent, "d/x/y": inputs.Absent,
	} {
		if got := tree.Lookup(path); got != want {
			t.Errorf("%q is %v, want %v", path, got, want)
		}
	}
	for path, want := range map[string]string{"d/f": "", "d/f/x": "d/f", "l/x/y": "l", "x/y": "", "d/new": "", "l": ""} {
		if got := tree.Obstacle(path); got != want {
			t.Errorf("in the way of %q is %q, want %q", path, got, want)
		}
	}
}

func TestPlaceMakesTheWholeTree(t *testing.T) {
	r := newRig(t)
	sub := r.put(&repb.Directory{})
	root := r.put(&repb.Directory{
		Files: []*repb.FileNode{
			{Name: "exe", Digest: r.bytes("same").Proto(), IsExecutable: true},
			{Name: "none", Digest: r.bytes("").Proto()},
			{Name: "own", Digest: r.bytes("same").Proto()},
			{Name: "plain", Digest: r.bytes("same").Proto()},
		},
		Directories: []*repb.DirectoryNode{{Name: "empty", Digest: sub.Proto()}},
		Symlinks:    []*repb.SymlinkNode{{Name: "out", Target: "/etc/passwd"}, {Name: "up", Target: "../.."}},
	})
	l := r.loader()
	tree, err := l.Load(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	to := inputs.Layout{
		Dir: filepath.Join(r.dir, "root"), UID: -1, Files: r.tier, Private: map[string]bool{"own": true},
		Parents: []string{"a/b/c", "empty/x", "top", "a/b2/c"},
	}
	if err := l.Place(t.Context(), tree, to); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{
		"exe": 0o555, "none": 0o444, "own": 0o644, "plain": 0o444, "empty": os.ModeDir | 0o755, "a/b": os.ModeDir | 0o755, "a/b2": os.ModeDir | 0o755,
	} {
		info, err := os.Lstat(filepath.Join(to.Dir, name))
		if err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, info, err, want)
		}
	}
	for name, want := range map[string]string{"out": "/etc/passwd", "up": "../.."} {
		if got, err := os.Readlink(filepath.Join(to.Dir, name)); err != nil || got != want {
			t.Errorf("%s leads to %q, %v", name, got, err)
		}
	}
	for _, absent := range []string{"a/b/c", "empty/x", "top"} {
		if _, err := os.Lstat(filepath.Join(to.Dir, absent)); err == nil {
			t.Errorf("%s exists", absent)
		}
	}
}

func BenchmarkPlace1000Files(b *testing.B) {
	r := newRig(b)
	root := &repb.Directory{}
	for i := range 50 {
		m := &repb.Directory{}
		for j := range 20 {
			d := r.bytes(strings.Repeat(fmt.Sprintf("%d/%d ", i, j), 2000))
			m.Files = append(m.Files, &repb.FileNode{Name: fmt.Sprintf("%02d", j), Digest: d.Proto()})
		}
		root.Directories = append(root.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("%02d", i), Digest: r.put(m).Proto()})
	}
	d := r.put(root)
	l := r.loader()
	n := 0
	place := func() {
		n++
		tree, err := l.Load(b.Context(), d)
		if err != nil {
			b.Fatal(err)
		}
		if err := l.Place(b.Context(), tree, inputs.Layout{Dir: filepath.Join(r.dir, fmt.Sprint(n)), UID: -1, Files: r.tier}); err != nil {
			b.Fatal(err)
		}
	}
	place()
	for b.Loop() {
		place()
	}
}

func TestDirectoriesOfATreeAreBoundedBeforeTheyAreRead(t *testing.T) {
	r := newRig(t)
	root := &repb.Directory{}
	for i := range 3 {
		d := r.put(&repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "l", Target: strings.Repeat(fmt.Sprint(i), 1000)}}})
		root.Directories = append(root.Directories,
			&repb.DirectoryNode{Name: fmt.Sprintf("%d", i), Digest: d.Proto()},
			&repb.DirectoryNode{Name: fmt.Sprintf("%d again", i), Digest: d.Proto()})
	}
	// What is known to be too much is not asked for.
	absent, err := r.space.New(strings.Repeat("ab", 32), 60<<20)
	if err != nil {
		t.Fatal(err)
	}
	limits := inputs.DefaultLimits()
	limits.Directories = 4500
	if _, err := inputs.NewLoader(r.tier, limits).Load(t.Context(), r.put(root)); err != nil {
		t.Errorf("three distinct directories of 1000 bytes: %v", err)
	}
	root.Directories = append(root.Directories, &repb.DirectoryNode{Name: "absent", Digest: absent.Proto()})
	_, err = inputs.NewLoader(r.tier, limits).Load(t.Context(), r.put(root))
	if !errors.Is(err, inputs.ErrInvalid) || !strings.Contains(err.Error(), "exceed 4500 bytes") {
		t.Errorf("error is %v", err)
	}
}

// stalling is a store in which one blob never arrives.
type stalling struct {
	cas.Store
	never digest.Digest
}

func (s stalling) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if d == s.never {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	return s.Store.Open(ctx, d, offset)
}

// TestDirectoryIsCheckedAsSoonAsItIsRead shows that no message waits for the others of its level.
func TestDirectoryIsCheckedAsSoonAsItIsRead(t *testing.T) {
	r := newRig(t)
	never, bad := r.put(&repb.Directory{}), r.bytes("no directory at all")
	never = r.put(&repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: never.Proto()}}})
	root := r.put(&repb.Directory{Directories: []*repb.DirectoryNode{
		{Name: "a", Digest: never.Proto()}, {Name: "b", Digest: bad.Proto()},
	}})
	_, err := inputs.NewLoader(stalling{r.store, never}, inputs.DefaultLimits()).Load(t.Context(), root)
	if !errors.Is(err, inputs.ErrInvalid) || !strings.Contains(err.Error(), bad.Blob()) {
		t.Errorf("error is %v", err)
	}
}
