package disk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a tier over a store in memory that counts its Opens.
type fixture struct {
	*disk.Tier
	memory *castest.Memory
	source *castest.Faulty
	opens  atomic.Int64
	from   []int64 // the offsets of the Opens; read it when nothing is going on
	dir    string
	out    string
	links  int
}

func start(t testing.TB, maxBytes int64) *fixture {
	t.Helper()
	x := &fixture{memory: castest.NewMemory(), dir: t.TempDir(), out: t.TempDir()}
	x.source = &castest.Faulty{Store: &recorder{Memory: x.memory, offsets: &x.from}}
	x.source.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
		if op == castest.OpOpen {
			x.opens.Add(1)
		}
		return castest.Fault{}
	}
	x.open(t, maxBytes)
	return x
}

// recorder notes the offsets of Opens.
type recorder struct {
	*castest.Memory
	mu      sync.Mutex // guards offsets
	offsets *[]int64
}

func (r *recorder) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r.mu.Lock()
	*r.offsets = append(*r.offsets, offset)
	r.mu.Unlock()
	return r.Memory.Open(ctx, d, offset)
}

func (x *fixture) open(t testing.TB, maxBytes int64) {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	tier, err := disk.Open(t.Context(), disk.Config{Dir: x.dir, MaxBytes: maxBytes, Source: x.source, Log: log})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	x.Tier = tier
	t.Cleanup(func() { tier.Close() })
}

// reopen is a kill and a start: nothing is written down in between.
func (x *fixture) reopen(t testing.TB, maxBytes int64) {
	t.Helper()
	x.Close()
	x.open(t, maxBytes)
}

func (x *fixture) blob(t testing.TB, size int) (digest.Digest, []byte) {
	t.Helper()
	d, data := castest.Blob(castest.Space(t, "disk/test"), size)
	if err := x.memory.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	return d, data
}

func (x *fixture) dst() string {
	x.links++
	return filepath.Join(x.out, fmt.Sprint("f", x.links))
}

// link links the blob and checks the file.
func (x *fixture) link(t testing.TB, d digest.Digest, executable bool, want []byte) string {
	t.Helper()
	dst := x.dst()
	if err := x.Link(t.Context(), d, executable, dst); err != nil {
		t.Fatalf("Link: %v", err)
	}
	wantFile(t, dst, want, map[bool]fs.FileMode{false: 0o444, true: 0o555}[executable])
	return dst
}

// until waits for something that other goroutines bring about.
func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("20 s have passed without %s", what)
		}
	}
}

func wantFile(t testing.TB, path string, want []byte, mode fs.FileMode) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s has %d bytes that are not the %d of the blob", path, len(got), len(want))
	}
	if info := stat(t, path); info.Mode() != mode {
		t.Fatalf("%s has mode %v, want %v", path, info.Mode(), mode)
	}
}

func stat(t testing.TB, path string) fs.FileInfo {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func nlink(t testing.TB, path string) int {
	t.Helper()
	return int(status(t, path).Nlink)
}

func status(t testing.TB, path string) *syscall.Stat_t {
	t.Helper()
	s, ok := stat(t, path).Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatalf("no stat of %s", path)
	}
	return s
}

// otherFileSystem returns a directory that the tier's files can't be linked into.
func otherFileSystem(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "jetfarm") //nolint:usetesting // It is about the place.
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func list(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		panic(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// wantSound checks that index and directory agree.
func (x *fixture) wantSound(t testing.TB) {
	t.Helper()
	for _, problem := range x.Check(list) {
		t.Error(problem)
	}
}

// files returns the paths of the cached files.
func (x *fixture) files() (paths []string) {
	for i := range 256 {
		shard := filepath.Join(x.dir, "cas", fmt.Sprintf("%02x", i))
		for _, name := range list(shard) {
			paths = append(paths, filepath.Join(shard, name))
		}
	}
	return paths
}

func TestConformance(t *testing.T) {
	for _, maxBytes := range []int64{64 << 20, 1 << 20} {
		t.Run(fmt.Sprint(maxBytes), func(t *testing.T) {
			x := start(t, maxBytes)
			castest.Run(t, func(testing.TB) cas.Store { return x.Tier })
			castest.RunFrames(t, func(testing.TB) cas.Store { return x.Tier })
			x.source.Store = castest.NewResumable()
			castest.RunResumer(t, func(testing.TB) cas.Store { return x.Tier })
			x.wantSound(t)
		})
	}
}

func TestLinkSharesOneFile(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 10000)
	a, b := x.link(t, d, false, data), x.link(t, d, false, data)
	if !os.SameFile(stat(t, a), stat(t, b)) || nlink(t, a) != 3 {
		t.Errorf("two links are not of one cached file (%d links)", nlink(t, a))
	}
	c := x.link(t, d, true, data)
	if os.SameFile(stat(t, a), stat(t, c)) {
		t.Error("the executable variant is the same inode, so it has the same mode")
	}
	if n := x.opens.Load(); n != 1 {
		t.Errorf("%d fetches for two variants of one blob, want 1", n)
	}
	x.wantSound(t)
}

func TestLinkErrors(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 100)
	absent, _ := castest.Blob(d.Space(), 100)
	impossible, err := d.Space().New(d.Hash(), 0)
	if err != nil {
		t.Fatal(err)
	}
	wrongSize, err := d.Space().New(d.Hash(), 101)
	if err != nil {
		t.Fatal(err)
	}
	dst := x.link(t, d, false, data)
	for name, test := range map[string]struct {
		d    digest.Digest
		dst  string
		want error
	}{
		"absent":       {absent, x.dst(), cas.ErrNotFound},
		"impossible":   {impossible, x.dst(), cas.ErrNotFound},
		"wrong size":   {wrongSize, x.dst(), cas.ErrNotFound},
		"exists":       {d, dst, fs.ErrExist},
		"no directory": {d, x.out + "/no/such", fs.ErrNotExist},
		"empty exists": {d.Space().Of(nil), dst, fs.ErrExist},
	} {
		for _, call := range []func(context.Context, digest.Digest, bool, string) error{x.Link, x.Copy} {
			if err := call(t.Context(), test.d, false, test.dst); !errors.Is(err, test.want) {
				t.Errorf("%s: error %v, want %v", name, err, test.want)
			}
		}
	}
	wantFile(t, dst, data, 0o444)
	x.wantSound(t)
}

func TestEmptyBlobIsAlwaysANewFile(t *testing.T) {
	x := start(t, 64<<20)
	empty := castest.Space(t, "").Of(nil)
	for _, executable := range []bool{false, true} {
		if dst := x.link(t, empty, executable, nil); nlink(t, dst) != 1 {
			t.Errorf("the empty file has %d links", nlink(t, dst))
		}
	}
	if n := len(x.files()); n != 0 {
		t.Errorf("%d cached files", n)
	}
}

func TestCopyIsPrivate(t *testing.T) {
	x := start(t, 64<<20)
	for _, size := range []int{0, 1, 100000} {
		d, data := x.blob(t, size)
		for executable, mode := range map[bool]fs.FileMode{false: 0o644, true: 0o755} {
			dst := x.dst()
			if err := x.Copy(t.Context(), d, executable, dst); err != nil {
				t.Fatalf("Copy: %v", err)
			}
			wantFile(t, dst, data, mode)
			if err := os.WriteFile(dst, []byte("changed"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		x.link(t, d, false, data)
	}
	if n := x.opens.Load(); n != 2 {
		t.Errorf("%d fetches, want 2", n)
	}
}

func TestLinkToAnotherFileSystem(t *testing.T) {
	x := start(t, 64<<20)
	x.out = otherFileSystem(t)
	d, data := x.blob(t, 3<<20)
	x.link(t, d, false, data)
	x.link(t, d, true, data)
}

// TestMoreLinksThanAFileCanHave makes more links than ext4 lets an inode have.
func TestMoreLinksThanAFileCanHave(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 100)
	for range 65010 {
		if err := x.Link(t.Context(), d, false, x.dst()); err != nil {
			t.Fatalf("link %d: %v", x.links, err)
		}
	}
	x.link(t, d, false, data)
	x.wantSound(t)
}

func TestBlobLargerThanTheTier(t *testing.T) {
	x := start(t, 1<<20)
	small, smallData := x.blob(t, 1000)
	x.link(t, small, false, smallData)
	d, data := x.blob(t, 3<<20)
	x.link(t, d, true, data)
	dst := x.dst()
	if err := x.Copy(t.Context(), d, false, dst); err != nil {
		t.Fatalf("Copy: %v", err)
	}
	wantFile(t, dst, data, 0o644)
	before := x.opens.Load()
	x.link(t, small, false, smallData)
	if x.opens.Load() != before {
		t.Error("a blob that does not fit has evicted another")
	}
	x.wantSound(t)
}

// TestSpaces: a worker may serve instances whose names are too long for a file name.
func TestSpaces(t *testing.T) {
	x := start(t, 64<<20)
	_, data := castest.Blob(castest.Space(t, ""), 1000)
	instances := []string{"", "a", "a-b", strings.Repeat("x", 104), strings.Repeat("y", digest.MaxInstance), strings.Repeat("é/", 84) + "é"}
	check := func() {
		for _, instance := range instances {
			d := castest.Space(t, instance).Of(data)
			if err := x.memory.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
			x.link(t, d, false, data)
		}
		absent := castest.Space(t, "other").Of(data)
		if err := x.Link(t.Context(), absent, false, x.dst()); !errors.Is(err, cas.ErrNotFound) {
			t.Errorf("a blob of other instances in instance other: error %v", err)
		}
		x.wantSound(t)
	}
	check()
	before := x.opens.Load()
	x.reopen(t, 64<<20)
	check()
	if n := x.opens.Load() - before; n != 1 {
		t.Errorf("%d Opens of the source after a restart, want 1, of the absent blob", n)
	}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
