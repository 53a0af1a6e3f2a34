package actioncache_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// raw writes a value as another program might.
func (x *fixture) raw(t testing.TB, a digest.Digest, value []byte) (get func() error) {
	t.Helper()
	js, err := jetstream.New(x.nc)
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.KeyValue(t.Context(), "ac-1")
	if err != nil {
		t.Fatal(err)
	}
	key := strings.NewReplacer("blobs/", "", "/", ".").Replace(a.Blob())
	key = a.Space().Token() + "." + key
	if value != nil {
		if _, err := kv.Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	} else if err := kv.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	return func() error {
		_, err := kv.Get(t.Context(), key)
		return err
	}
}

// TestDamagedEntry is row ACG-9.
func TestDamagedEntry(t *testing.T) {
	x := start(t)
	marshal := func(r *repb.ActionResult) []byte {
		data, err := proto.MarshalOptions{}.MarshalAppend([]byte{1}, r)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	garbage := x.blob(t, []byte("this is not a Tree"))
	cut := x.blob(t, []byte{0x0a, 0x7f, 1, 2, 3})
	badFile := x.message(t, &repb.Tree{Root: &repb.Directory{Files: []*repb.FileNode{{Name: "f"}}}})
	for name, value := range map[string][]byte{
		"empty":           {},
		"unknown form":    {9, 1, 2},
		"garbage":         {1, 0xff, 0xff},
		"bad reference":   {2, 0xff},
		"no reference":    {2},
		"huge reference":  append([]byte{2}, mustMarshal(t, &repb.Digest{Hash: garbage.GetHash(), SizeBytes: 1 << 40})...),
		"no digest":       marshal(&repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "a"}}}),
		"bad digest":      marshal(&repb.ActionResult{StdoutDigest: &repb.Digest{Hash: "xyz"}}),
		"bad path":        marshal(&repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "/a", Digest: garbage}}}),
		"no directory":    marshal(&repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "a"}}}),
		"garbage Tree":    marshal(&repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "a", TreeDigest: garbage}}}),
		"Tree cut off":    marshal(&repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "a", TreeDigest: cut}}}),
		"bad file inside": marshal(&repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "a", TreeDigest: badFile}}}),
		"garbage root":    marshal(&repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "a", RootDirectoryDigest: garbage}}}),
	} {
		a := action(x, name)
		get := x.raw(t, a, value)
		if _, err := x.Get(t.Context(), a); !errors.Is(err, actioncache.ErrNotFound) {
			t.Errorf("%s: error %v, want ErrNotFound", name, err)
		}
		if err := get(); !errors.Is(err, jetstream.ErrKeyNotFound) {
			t.Errorf("%s: the entry is still there: error %v", name, err)
		}
	}
	a := action(x, "deleted by another client")
	x.put(t, a, &repb.ActionResult{})
	x.raw(t, a, nil)
	x.wantNone(t, a)
	x.put(t, a, &repb.ActionResult{})
	x.want(t, a, &repb.ActionResult{})
}

func mustMarshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestLargeResult: what does not fit into a message is kept as a blob.
func TestLargeResult(t *testing.T) {
	x := start(t)
	a := action(x, "a")
	d := x.blob(t, []byte("data"))
	result := new(repb.ActionResult)
	for i := range 5000 {
		result.OutputFiles = append(result.OutputFiles, &repb.OutputFile{Path: strings.Repeat("p", 100) + string(rune('a'+i%26)) + strings.Repeat("/q", i/26+1), Digest: d})
	}
	if size := proto.Size(result); size < 1<<20 {
		t.Fatalf("the result has %d bytes only", size)
	}
	x.put(t, a, result)
	x.want(t, a, result)
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(result)
	if err != nil {
		t.Fatal(err)
	}
	x.memory.Remove(x.space.Of(data))
	x.wantNone(t, a)
	x.put(t, a, result)
	x.want(t, a, result)
}

// TestHugeTree is row ACG-16: it is checked while it streams, or given up.
func TestHugeTree(t *testing.T) {
	x := start(t)
	child, last := new(repb.Directory), x.space.Of([]byte("absent"))
	d := x.blob(t, []byte("data"))
	for i := range 1000 {
		child.Files = append(child.Files, &repb.FileNode{Name: strings.Repeat("n", i%50+1), Digest: d})
	}
	end := &repb.Directory{Files: []*repb.FileNode{{Name: "last", Digest: last.Proto()}}}
	encoded := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), mustMarshal(t, child))
	tree := func(more ...byte) *repb.ActionResult {
		tree := x.blob(t, append(bytes.Repeat(encoded, 100), more...))
		return &repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "d", TreeDigest: tree}}}
	}
	fits := tree()
	x.put(t, action(x, "fits"), fits)
	x.want(t, action(x, "fits"), fits)

	absent := tree(protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), mustMarshal(t, end))...)
	var missing *actioncache.MissingError
	if err := x.Put(t.Context(), action(x, "absent"), absent); !errors.As(err, &missing) || missing.Missing[0] != last {
		t.Errorf("error %v, want the last of 100 001 files to be missing", err)
	}

	many := protowire.AppendBytes(encoded[:1:1], mustMarshal(t, &repb.Directory{Directories: make([]*repb.DirectoryNode, 1000)}))
	huge := &repb.ActionResult{OutputDirectories: []*repb.OutputDirectory{{Path: "d", TreeDigest: x.blob(t, bytes.Repeat(many, 1000))}}}
	x.raw(t, action(x, "huge"), append([]byte{1}, mustMarshal(t, huge)...))
	x.wantNone(t, action(x, "huge"))
	if err := x.Put(t.Context(), action(x, "huge"), huge); err == nil || errors.Is(err, actioncache.ErrInvalid) {
		t.Errorf("a Tree of a million nodes: error %v, want one that does not blame it", err)
	}
}
