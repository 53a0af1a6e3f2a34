package frontend_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	remoteasset "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// tarball is a tar with files; a name with a colon is a link to what follows.
func tarball(t testing.TB, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range names {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(name))}
		if from, to, ok := strings.Cut(name, ":"); ok {
			h = &tar.Header{Name: from, Typeflag: tar.TypeSymlink, Linkname: to}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (r *assetRig) directory(t testing.TB, code codes.Code, req *remoteasset.FetchDirectoryRequest) *repb.Digest {
	t.Helper()
	resp, err := r.fetch.FetchDirectory(t.Context(), req)
	if err != nil {
		t.Fatalf("FetchDirectory: %v", err)
	}
	wantInline(t, resp.GetStatus(), code)
	return resp.GetRootDirectoryDigest()
}

// names returns the names in a tree, as GetTree has them.
func (r *assetRig) names(t testing.TB, root *repb.Digest) string {
	t.Helper()
	stream, err := r.cas.GetTree(t.Context(), &repb.GetTreeRequest{RootDigest: root})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return strings.Join(names, " ")
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range m.GetDirectories() {
			for _, f := range d.GetFiles() {
				names = append(names, f.GetName())
			}
			for _, c := range d.GetDirectories() {
				names = append(names, c.GetName()+"/")
			}
			for _, l := range d.GetSymlinks() {
				names = append(names, l.GetName()+"->"+l.GetTarget())
			}
		}
	}
}

func TestFetchDirectory(t *testing.T) {
	r := startAssets(t, func(c *frontend.Config) { c.Assets.Unpack.Entries = 20 })
	good := tarball(t, "top/a", "top/sub/b", "top/l:sub/b")
	r.origin.set("/good.tar", good)
	r.origin.set("/climbs.tar", tarball(t, "../x"))
	r.origin.set("/absolute.tar", tarball(t, "/x"))
	r.origin.set("/link.tar", tarball(t, "l:../../etc/passwd"))
	r.origin.set("/text", []byte("no archive"))
	r.origin.set("/many.tar", tarball(t, strings.Split("a b c d e f g h i j k l m n o p q r s t u v w", " ")...))
	uris := func(path string) []string { return []string{r.origin.URL + path} }
	t.Run("AST-12 a tree", func(t *testing.T) {
		root := r.directory(t, codes.OK, &remoteasset.FetchDirectoryRequest{Uris: uris("/good.tar"), Qualifiers: qualifiers("checksum.sri", sri(good), "resource_type", "application/x-tar")})
		if got := r.names(t, root); got != "top/ a sub/ l->sub/b b" {
			t.Errorf("%s", got)
		}
		before := r.origin.requests.Load()
		again := r.directory(t, codes.OK, &remoteasset.FetchDirectoryRequest{Uris: uris("/good.tar"), Qualifiers: qualifiers("resource_type", "application/x-tar", "checksum.sri", sri(good))})
		if again.GetHash() != root.GetHash() || r.origin.requests.Load() != before {
			t.Errorf("again %v after %d requests", again, r.origin.requests.Load()-before)
		}
	})
	t.Run("AST-12 a part of a tree", func(t *testing.T) {
		root := r.directory(t, codes.OK, &remoteasset.FetchDirectoryRequest{Uris: uris("/good.tar"), Qualifiers: qualifiers("directory", "top/sub")})
		if got := r.names(t, root); got != "b" {
			t.Errorf("%s", got)
		}
		r.directory(t, codes.NotFound, &remoteasset.FetchDirectoryRequest{Uris: uris("/good.tar"), Qualifiers: qualifiers("directory", "none")})
	})
	for path, code := range map[string]codes.Code{
		"/climbs.tar": codes.Aborted, "/absolute.tar": codes.Aborted, "/link.tar": codes.Aborted, "/text": codes.Aborted,
		"/many.tar": codes.ResourceExhausted, "/none": codes.NotFound,
	} {
		t.Run("AST-12 "+path[1:], func(t *testing.T) {
			if d := r.directory(t, code, &remoteasset.FetchDirectoryRequest{Uris: uris(path)}); d != nil {
				t.Errorf("digest %v", d)
			}
		})
	}
	_, err := r.fetch.FetchDirectory(t.Context(), &remoteasset.FetchDirectoryRequest{Uris: uris("/good.tar"), Qualifiers: qualifiers("resource_type", "application/x-git")})
	wantCode(t, "AST-2 git", err, codes.InvalidArgument)
}

// Directories that the farm makes are encoded as everybody encodes them, whatever the order in an archive.
func TestGEN_19_DirectoriesAreCanonical(t *testing.T) {
	r := startAssets(t)
	fetch := func(path string, names ...string) digest.Digest {
		r.origin.set(path, tarball(t, names...))
		return must(space.Parse(r.directory(t, codes.OK, &remoteasset.FetchDirectoryRequest{Uris: []string{r.origin.URL + path}})))
	}
	root := fetch("/one.tar", "b", "Z", "a", "z/y", "c/x", "c/a", "m:a", "l:a", "c.d/e")
	if other := fetch("/two.tar", "c.d/e", "l:a", "c/a", "m:a", "a", "c/x", "z/y", "b", "Z"); other != root {
		t.Errorf("another order makes %v of the same tree, not %v", other, root)
	}
	for todo := []digest.Digest{root}; len(todo) > 0; todo = todo[1:] {
		data, err := r.read(t.Context(), &bytestream.ReadRequest{ResourceName: todo[0].String()})
		if err != nil {
			t.Fatalf("Read: %v", err)
		}
		d := new(repb.Directory)
		if err := proto.Unmarshal(data, d); err != nil {
			t.Fatalf("Unmarshal: %v", err)
		}
		sorted := slices.IsSortedFunc(d.GetFiles(), func(a, b *repb.FileNode) int { return strings.Compare(a.GetName(), b.GetName()) }) &&
			slices.IsSortedFunc(d.GetDirectories(), func(a, b *repb.DirectoryNode) int { return strings.Compare(a.GetName(), b.GetName()) }) &&
			slices.IsSortedFunc(d.GetSymlinks(), func(a, b *repb.SymlinkNode) int { return strings.Compare(a.GetName(), b.GetName()) })
		if !sorted || !bytes.Equal(encode(d), data) {
			t.Errorf("not canonical: %v", d)
		}
		for _, child := range d.GetDirectories() {
			todo = append(todo, must(space.Parse(child.GetDigest())))
		}
	}
}

func TestPush(t *testing.T) {
	memory := castest.NewMemory()
	r := startAssets(t, func(c *frontend.Config) { c.Blobs = memory })
	data := r.put(t, random(100))
	reference := r.put(t, random(100))
	uris := []string{"urn:uuid:1", "https://example.com/x"}
	qs := qualifiers("vcs.commit", "abc", "anything", "else")
	_, err := r.push.PushBlob(t.Context(), &remoteasset.PushBlobRequest{
		Uris: uris, Qualifiers: qs, BlobDigest: data.Proto(), ReferencesBlobs: protos(reference),
	})
	if err != nil {
		t.Fatal(err)
	}
	fetchOf := func(uri string) *remoteasset.FetchBlobRequest {
		return &remoteasset.FetchBlobRequest{Uris: []string{uri}, Qualifiers: qualifiers("anything", "else", "vcs.commit", "abc")}
	}
	for _, uri := range uris {
		if resp := r.blob(t, codes.OK, fetchOf(uri)); resp.GetBlobDigest().GetHash() != data.Hash() || resp.GetUri() != uri {
			t.Errorf("%v", resp)
		}
	}
	_, err = r.fetch.FetchBlob(t.Context(), &remoteasset.FetchBlobRequest{Uris: uris, Qualifiers: qualifiers("vcs.commit", "other")})
	wantCode(t, "AST-2 with another value", err, codes.InvalidArgument)
	r.blob(t, codes.NotFound, &remoteasset.FetchBlobRequest{Uris: uris[:1]})
	t.Run("AST-9 references", func(t *testing.T) {
		memory.Remove(reference)
		_, err := r.fetch.FetchBlob(t.Context(), fetchOf(uris[0]))
		wantCode(t, "what refers to an absent blob", err, codes.InvalidArgument)
	})
	t.Run("AST-9 expire_at", func(t *testing.T) {
		for expire, code := range map[time.Duration]codes.Code{time.Hour: codes.OK, -time.Second: codes.NotFound} {
			_, err := r.push.PushBlob(t.Context(), &remoteasset.PushBlobRequest{
				Uris: []string{"urn:x"}, BlobDigest: data.Proto(), ExpireAt: timestamppb.New(time.Now().Add(expire)),
			})
			if err != nil {
				t.Fatal(err)
			}
			r.blob(t, code, &remoteasset.FetchBlobRequest{Uris: []string{"urn:x"}})
		}
	})
	file := r.put(t, random(10))
	sub := r.putMessage(t, &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: file.Proto()}}})
	root := r.putMessage(t, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: sub.Proto()}}})
	pushDirectory := func(d digest.Digest) error {
		_, err := r.push.PushDirectory(t.Context(), &remoteasset.PushDirectoryRequest{Uris: []string{"urn:d"}, RootDirectoryDigest: d.Proto()})
		return err
	}
	if err := pushDirectory(root); err != nil {
		t.Fatal(err)
	}
	if d := r.directory(t, codes.OK, &remoteasset.FetchDirectoryRequest{Uris: []string{"urn:d"}}); d.GetHash() != root.Hash() {
		t.Errorf("%v, want %v", d, root)
	}
	r.blob(t, codes.NotFound, &remoteasset.FetchBlobRequest{Uris: []string{"urn:d"}})
	for name, missing := range map[string]digest.Digest{"file": file, "directory": sub, "root": root} {
		t.Run("AST-9 absent "+name, func(t *testing.T) {
			kept := must(cas.ReadAll(t.Context(), memory, missing, 1000))
			memory.Remove(missing)
			defer memory.Corrupt(missing, kept)
			wantCode(t, "PushDirectory", pushDirectory(root), codes.FailedPrecondition)
			r.directory(t, codes.NotFound, &remoteasset.FetchDirectoryRequest{Uris: []string{"urn:d"}})
		})
	}
	for name, req := range map[string]*remoteasset.PushBlobRequest{
		"AST-1 no URI":       {BlobDigest: data.Proto()},
		"AST-1 duplicate":    {Uris: uris, BlobDigest: data.Proto(), Qualifiers: qualifiers("a", "1", "a", "2")},
		"AST-9 no digest":    {Uris: uris},
		"AST-9 bad digest":   {Uris: uris, BlobDigest: &repb.Digest{Hash: "x"}},
		"AST-9 bad expiry":   {Uris: uris, BlobDigest: data.Proto(), ExpireAt: &timestamppb.Timestamp{Nanos: -1}},
		"AST-9 references":   {Uris: uris, BlobDigest: data.Proto(), ReferencesBlobs: protos(slicesRepeat(data, 1001)...)},
		"AST-9 no reference": {Uris: uris, BlobDigest: data.Proto(), ReferencesDirectories: []*repb.Digest{nil}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.push.PushBlob(t.Context(), req)
			wantCode(t, "PushBlob", err, codes.InvalidArgument)
		})
	}
	_, err = r.push.PushBlob(t.Context(), &remoteasset.PushBlobRequest{Uris: uris, BlobDigest: absent().Proto()})
	wantCode(t, "AST-9 absent blob", err, codes.FailedPrecondition)
}

func slicesRepeat(d digest.Digest, n int) []digest.Digest {
	ds := make([]digest.Digest, n)
	for i := range ds {
		ds[i] = d
	}
	return ds
}

func TestAST_9_PushIsOffByDefault(t *testing.T) {
	r := startAssets(t, func(c *frontend.Config) { c.AllowActionCacheUpdates = false })
	d := r.put(t, random(10))
	_, err := r.push.PushBlob(t.Context(), &remoteasset.PushBlobRequest{Uris: []string{"urn:x"}, BlobDigest: d.Proto()})
	wantCode(t, "PushBlob", err, codes.PermissionDenied, "--action-cache-updates")
	_, err = r.push.PushDirectory(t.Context(), &remoteasset.PushDirectoryRequest{Uris: []string{"urn:x"}, RootDirectoryDigest: emptyDigest.Proto()})
	wantCode(t, "PushDirectory", err, codes.PermissionDenied)
	r.blob(t, codes.NotFound, &remoteasset.FetchBlobRequest{Uris: []string{"urn:x"}})
}

func TestAssetsAreOptional(t *testing.T) {
	h := start(t)
	_, err := remoteasset.NewFetchClient(h.conn).FetchBlob(t.Context(), &remoteasset.FetchBlobRequest{})
	wantCode(t, "FetchBlob", err, codes.Unimplemented)
}
