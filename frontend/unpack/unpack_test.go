package unpack_test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend/spool"
	"github.com/jetfarm/jetfarm/frontend/unpack"
)

// entry is what an archive has, in order. A zip has no hard links.
type entry struct {
	name    string
	content string
	kind    byte // a type of package tar; 0 is a file
	mode    int64
	link    string
}

func file(name, content string) entry { return entry{name: name, content: content} }
func link(name, to string) entry      { return entry{name: name, kind: tar.TypeSymlink, link: to} }
func dir(name string) entry           { return entry{name: name, kind: tar.TypeDir} }
func hard(name, to string) entry      { return entry{name: name, kind: tar.TypeLink, link: to} }

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Size: int64(len(e.content)), Mode: 0o644 | e.mode}
		if e.kind == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, e := range entries {
		h := &zip.FileHeader{Name: e.name, Method: zip.Deflate}
		h.SetMode(fs.FileMode(0o644 | e.mode))
		content := e.content
		switch e.kind {
		case tar.TypeDir:
			h.SetMode(fs.ModeDir | 0o755)
		case tar.TypeSymlink:
			h.SetMode(fs.ModeSymlink | 0o777)
			content = e.link
		case tar.TypeFifo:
			h.SetMode(fs.ModeNamedPipe | 0o644)
		}
		f, err := w.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(f, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipOf(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstdOf(t testing.TB, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil)
}

// rig is a store and a pool.
type rig struct {
	blobs *castest.Memory
	pool  *spool.Pool
	space digest.Space
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{blobs: castest.NewMemory(), pool: spool.NewPool(t.TempDir(), 1<<30), space: castest.Space(t, "unpack")}
	t.Cleanup(func() {
		if n := r.pool.Used(); n != 0 {
			t.Errorf("%d bytes of the spool are still used", n)
		}
	})
	return r
}

func (r *rig) unpack(t testing.TB, data []byte, limits unpack.Limits, directory string) (digest.Digest, error) {
	t.Helper()
	f := r.pool.New()
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	return unpack.Archive(t.Context(), unpack.Config{Blobs: r.blobs, Space: r.space, Spool: r.pool, Limits: limits, Directory: directory}, f)
}

// walk returns what is below a directory: content by name, with the kind before it.
func (r *rig) walk(t testing.TB, d *repb.Digest, prefix string, into map[string]string) {
	t.Helper()
	message := &repb.Directory{}
	if err := proto.Unmarshal([]byte(r.read(t, d)), message); err != nil {
		t.Fatal(err)
	}
	if prefix != "" && len(message.GetFiles())+len(message.GetDirectories())+len(message.GetSymlinks()) == 0 {
		into[prefix] = "empty"
	}
	for _, f := range message.GetFiles() {
		kind := "file "
		if f.GetIsExecutable() {
			kind = "program "
		}
		into[prefix+f.GetName()] = kind + r.read(t, f.GetDigest())
	}
	for _, l := range message.GetSymlinks() {
		into[prefix+l.GetName()] = "link " + l.GetTarget()
	}
	for _, c := range message.GetDirectories() {
		r.walk(t, c.GetDigest(), prefix+c.GetName()+"/", into)
	}
}

func (r *rig) read(t testing.TB, m *repb.Digest) string {
	t.Helper()
	d, err := r.space.Parse(m)
	if err != nil {
		t.Fatal(err)
	}
	data, err := cas.ReadAll(t.Context(), r.blobs, d, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestArchive(t *testing.T) {
	large := strings.Repeat("large ", 100_000)
	entries := []entry{
		dir("./"), dir("p/"), file("./p/a", "content of a"), file("p/empty", ""),
		{name: "p/run.sh", content: "#!", mode: 0o111},
		file("p/deep/er/f", "deep"), link("p/deep/up", "../a"), link("p/l", "deep/er"), dir("p/nothing/"), file("p/large", large), file("é/ü", "x"),
	}
	all := map[string]string{
		"p/a": "file content of a", "p/empty": "file ", "p/run.sh": "program #!", "p/deep/er/f": "file deep", "p/deep/up": "link ../a",
		"p/l": "link deep/er", "p/nothing/": "empty", "p/large": "file " + large, "é/ü": "file x",
	}
	plain := tarOf(t, append(entries, hard("p/same", "./p/a"))...)
	withHard := maps.Clone(all)
	withHard["p/same"] = "file content of a"
	for name, test := range map[string]struct {
		data []byte
		dir  string
		want map[string]string
	}{
		"tar":               {plain, "", withHard},
		"tar.gz":            {gzipOf(t, plain), "", withHard},
		"tar.zst":           {zstdOf(t, plain), "", withHard},
		"zip":               {zipOf(t, entries...), "", all},
		"empty tar":         {tarOf(t), "", map[string]string{}},
		"empty zip":         {zipOf(t), "", map[string]string{}},
		"directory":         {plain, "p/deep/er", map[string]string{"f": "file deep"}},
		"directory of zip":  {zipOf(t, entries...), "é", map[string]string{"ü": "file x"}},
		"directory, ./ and": {plain, "./p/nothing/", map[string]string{}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			root, err := r.unpack(t, test.data, unpack.Limits{}, test.dir)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			r.walk(t, root.Proto(), "", got)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestHostileArchives(t *testing.T) {
	limits := unpack.Limits{Entries: 50, Bytes: 1 << 20, Depth: 10}
	deep := strings.Repeat("d/", 10)
	many := make([]entry, 60)
	for i := range many {
		many[i] = file(fmt.Sprint(i), "")
	}
	zeros := strings.Repeat("\x00", 2<<20)
	both := map[string]struct {
		entries []entry
		want    error
	}{
		"climbs":                  {[]entry{file("../x", "")}, unpack.ErrInvalid},
		"climbs later":            {[]entry{file("a/../../x", "")}, unpack.ErrInvalid},
		"climbs and comes back":   {[]entry{file("a/../b", "")}, unpack.ErrInvalid},
		"absolute":                {[]entry{file("/etc/passwd", "")}, unpack.ErrInvalid},
		"directory climbs":        {[]entry{dir("../")}, unpack.ErrInvalid},
		"long segment":            {[]entry{file(strings.Repeat("x", 256), "")}, unpack.ErrInvalid},
		"long path":               {[]entry{file(strings.Repeat("x/", 2050)+"y", "")}, unpack.ErrInvalid},
		"not UTF-8":               {[]entry{file("\xff\xfe", "")}, unpack.ErrInvalid},
		"twice":                   {[]entry{file("a", "1"), file("a", "2")}, unpack.ErrInvalid},
		"twice in other words":    {[]entry{file("a/b", "1"), file("./a//b", "2")}, unpack.ErrInvalid},
		"file and directory":      {[]entry{file("a", "1"), file("a/b", "2")}, unpack.ErrInvalid},
		"directory and file":      {[]entry{file("a/b", "1"), file("a", "2")}, unpack.ErrInvalid},
		"root is a file":          {[]entry{file(".", "1")}, unpack.ErrInvalid},
		"link leads out":          {[]entry{link("l", "../x")}, unpack.ErrInvalid},
		"deep link leads out":     {[]entry{link("a/b/l", "../../../x")}, unpack.ErrInvalid},
		"absolute link":           {[]entry{link("l", "/etc")}, unpack.ErrInvalid},
		"link without a target":   {[]entry{link("l", "")}, unpack.ErrInvalid},
		"link through a link":     {[]entry{link("here", "."), link("l", "here/../x")}, unpack.ErrInvalid},
		"write through a link":    {[]entry{link("d", "e"), file("d/f", "x")}, unpack.ErrInvalid},
		"link and file":           {[]entry{link("d", "e"), file("d", "x")}, unpack.ErrInvalid},
		"special file":            {[]entry{{name: "p", kind: tar.TypeFifo}}, unpack.ErrInvalid},
		"too many":                {many, unpack.ErrTooLarge},
		"too deep":                {[]entry{file(deep+"x", "")}, unpack.ErrTooLarge},
		"too large":               {[]entry{file("a", zeros)}, unpack.ErrTooLarge},
		"too large in all":        {[]entry{file("a", zeros[:600<<10]), file("b", zeros[:600<<10])}, unpack.ErrTooLarge},
		"directories beyond many": {slices.Repeat([]entry{dir("d/")}, 60), unpack.ErrTooLarge},
	}
	cases := map[string]hostile{
		"text":                   {[]byte("hello, world"), unpack.ErrInvalid},
		"nothing":                {nil, unpack.ErrInvalid},
		"a long text":            {bytes.Repeat([]byte("hello "), 1000), unpack.ErrInvalid},
		"xz":                     {[]byte("\xfd7zXZ\x00 and so on"), unpack.ErrInvalid},
		"gzip of text":           {gzipOf(t, []byte("hello")), unpack.ErrInvalid},
		"gzip cut off":           {cut(gzipOf(t, tarOf(t, file("a", strings.Repeat("x", 5000)))), 30), unpack.ErrInvalid},
		"gzip header only":       {[]byte{0x1f, 0x8b}, unpack.ErrInvalid},
		"zstd cut off":           {cut(zstdOf(t, tarOf(t, file("a", strings.Repeat("x", 5000)))), 5), unpack.ErrInvalid},
		"zstd of nonsense":       {[]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3}, unpack.ErrInvalid},
		"bzip2 of nonsense":      {[]byte("BZh9 nonsense"), unpack.ErrInvalid},
		"tar cut off":            {cut(tarOf(t, file("a", strings.Repeat("x", 5000))), 4000), unpack.ErrInvalid},
		"zip cut off":            {cut(zipOf(t, file("a", "x")), 10), unpack.ErrInvalid},
		"zip with other bytes":   {flip(zipOf(t, file("a", strings.Repeat("abc", 100))), 40), unpack.ErrInvalid},
		"zip with a backslash":   {zipOf(t, file(`..\x`, "")), unpack.ErrInvalid},
		"gzip bomb":              {gzipOf(t, tarOf(t, file("a", strings.Repeat("\x00", 64<<20)))), unpack.ErrTooLarge},
		"gzip of endless zeros":  {gzipOf(t, make([]byte, 64<<20)), nil},
		"zstd bomb":              {zstdOf(t, tarOf(t, file("a", strings.Repeat("\x00", 64<<20)))), unpack.ErrTooLarge},
		"hard link out":          {tarOf(t, hard("h", "../x")), unpack.ErrInvalid},
		"hard link to nothing":   {tarOf(t, hard("h", "x")), unpack.ErrInvalid},
		"hard link to directory": {tarOf(t, dir("d/"), hard("h", "d")), unpack.ErrInvalid},
		"device":                 {tarOf(t, entry{name: "null", kind: tar.TypeChar}), unpack.ErrInvalid},
	}
	for name, test := range both {
		cases[name+" in tar"] = hostile{tarOf(t, test.entries...), test.want}
		cases[name+" in zip"] = hostile{zipOf(t, test.entries...), test.want}
	}
	// A tar may have a name that ends with a slash for what is a file; in a zip it is a directory.
	for name, test := range cases {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			if _, err := r.unpack(t, test.data, limits, ""); !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
				t.Errorf("error %v, want %v", err, test.want)
			}
		})
	}
}

type hostile struct {
	data []byte
	want error
}

func cut(data []byte, n int) []byte { return data[:len(data)-n] }

func flip(data []byte, at int) []byte {
	data[at] ^= 0xff
	return data
}

// A link that stays in the archive may still lead out of the directory that is wanted of it.
func TestDirectoryOfAnArchive(t *testing.T) {
	data := tarOf(t, file("a/f", "x"), link("b/l", "../a/f"), file("b/g", "y"))
	r := newRig(t)
	if _, err := r.unpack(t, data, unpack.Limits{}, ""); err != nil {
		t.Errorf("all of it: %v", err)
	}
	for directory, want := range map[string]error{
		"b": unpack.ErrInvalid, "c": unpack.ErrNoDirectory, "a/f": unpack.ErrNoDirectory, "../a": unpack.ErrInvalid, "/a": unpack.ErrInvalid, "a": nil,
	} {
		if _, err := r.unpack(t, data, unpack.Limits{}, directory); !errors.Is(err, want) {
			t.Errorf("%s: error %v, want %v", directory, err, want)
		}
	}
}

func TestStoreFails(t *testing.T) {
	broken := errors.New("the test broke it")
	for _, size := range []int{10, 1 << 20} {
		r := newRig(t)
		f := r.pool.New()
		if _, err := f.Write(tarOf(t, file("a", strings.Repeat("x", size)))); err != nil {
			t.Fatal(err)
		}
		faulty := &castest.Faulty{Store: r.blobs, Plan: func(castest.Op, digest.Digest) castest.Fault {
			return castest.Fault{Err: broken, After: -1}
		}}
		_, err := unpack.Archive(t.Context(), unpack.Config{Blobs: faulty, Space: r.space, Spool: r.pool}, f)
		if !errors.Is(err, broken) {
			t.Errorf("error %v, want that of the store", err)
		}
		stop := errors.New("the test stopped it")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(stop)
		if _, err := unpack.Archive(ctx, unpack.Config{Blobs: r.blobs, Space: r.space, Spool: r.pool}, f); !errors.Is(err, stop) {
			t.Errorf("error %v, want the cause of ctx", err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzArchive(f *testing.F) {
	for _, seed := range [][]byte{
		tarOf(f, file("a/b", "x"), link("l", "a"), hard("h", "a/b")), zipOf(f, file("a/b", "x"), link("l", "a")),
		gzipOf(f, tarOf(f, file("a", "x"))), zstdOf(f, tarOf(f, file("a", "x"))), []byte("BZh9"), nil,
	} {
		f.Add(seed)
	}
	space := castest.Space(f, "fuzz")
	f.Fuzz(func(t *testing.T, data []byte) {
		blobs, pool := castest.NewMemory(), spool.NewPool(t.TempDir(), 1<<24)
		in := pool.New()
		if _, err := in.Write(data); err != nil {
			t.Skip()
		}
		root, err := unpack.Archive(t.Context(), unpack.Config{
			Blobs: blobs, Space: space, Spool: pool, Limits: unpack.Limits{Entries: 1000, Bytes: 1 << 22},
		}, in)
		if err == nil {
			r := &rig{blobs: blobs, pool: pool, space: space}
			r.walk(t, root.Proto(), "", map[string]string{})
		}
		if err := in.Close(); err != nil || pool.Used() != 0 {
			t.Errorf("%v, %d bytes still used", err, pool.Used())
		}
	})
}
