package frontend_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// page is one message of GetTree.
type page struct {
	digests []digest.Digest
	token   string
}

// tree calls GetTree and returns its pages. Directories are told apart by their digests.
func (h *harness) tree(ctx context.Context, req *repb.GetTreeRequest) ([]page, error) {
	stream, err := h.cas.GetTree(ctx, req)
	if err != nil {
		return nil, err
	}
	var pages []page
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return pages, nil
		}
		if err != nil {
			return pages, err
		}
		p := page{token: m.GetNextPageToken()}
		for _, d := range m.GetDirectories() {
			p.digests = append(p.digests, space.Of(encode(d)))
		}
		pages = append(pages, p)
	}
}

func all(pages []page) []digest.Digest {
	var ds []digest.Digest
	for _, p := range pages {
		ds = append(ds, p.digests...)
	}
	return ds
}

// directory is a Directory of subdirectories.
func directory(children ...digest.Digest) *repb.Directory {
	d := &repb.Directory{}
	for i, child := range children {
		d.Directories = append(d.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("d%03d", i), Digest: child.Proto()})
	}
	return d
}

// leaf is a Directory like no other.
func leaf(name string) *repb.Directory {
	return &repb.Directory{Files: []*repb.FileNode{{Name: name, Digest: space.Of([]byte(name)).Proto()}}}
}

// threeLevels stores a tree of 1 + 3 + 9 directories and returns them in breadth-first order.
func threeLevels(t testing.TB, h *harness) []digest.Digest {
	t.Helper()
	var middle, leaves []digest.Digest
	for i := range 3 {
		var children []digest.Digest
		for j := range 3 {
			children = append(children, h.putMessage(t, leaf(fmt.Sprint(i, j))))
		}
		leaves = append(leaves, children...)
		middle = append(middle, h.putMessage(t, directory(children...)))
	}
	root := h.putMessage(t, directory(middle...))
	return append(append([]digest.Digest{root}, middle...), leaves...)
}

func diffDigests(want, got []digest.Digest) string {
	return cmp.Diff(want, got, cmp.Comparer(func(a, b digest.Digest) bool { return a == b }))
}

func TestTREE_2_EveryDirectoryOnce(t *testing.T) {
	h := start(t)
	want := threeLevels(t, h)
	pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: want[0].Proto()})
	if err != nil {
		t.Fatalf("GetTree: %v", err)
	}
	if diff := diffDigests(want, all(pages)); diff != "" {
		t.Errorf("directories (-want +got):\n%s", diff)
	}
	if len(pages) != 1 || pages[0].token != "" {
		t.Errorf("%d pages, token %q, want one without a token", len(pages), pages[0].token)
	}
}

// Rows TREE-4 to TREE-7.
func TestTREE_4_TREE_5_TREE_6_TREE_7_TokensResume(t *testing.T) {
	h := start(t)
	want := threeLevels(t, h)
	other := startOn(t, h.farm)
	for _, size := range []int32{1, 3, 4, 12, 13, 1 << 30} {
		t.Run(fmt.Sprint("page_size=", size), func(t *testing.T) {
			pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: want[0].Proto(), PageSize: size})
			if err != nil {
				t.Fatalf("GetTree: %v", err)
			}
			if diff := diffDigests(want, all(pages)); diff != "" {
				t.Fatalf("directories (-want +got):\n%s", diff)
			}
			for i, p := range pages {
				if len(p.digests) > int(size) {
					t.Errorf("page %d has %d directories", i, len(p.digests))
				}
				if last := i == len(pages)-1; (p.token == "") != last {
					t.Errorf("page %d of %d has the token %q", i, len(pages), p.token)
				}
				if p.token == "" {
					continue
				}
				rest, err := other.tree(t.Context(), &repb.GetTreeRequest{RootDigest: want[0].Proto(), PageSize: size, PageToken: p.token})
				if err != nil {
					t.Fatalf("GetTree from page %d on another frontend: %v", i, err)
				}
				if diff := diffDigests(want, append(all(pages[:i+1]), all(rest)...)); diff != "" {
					t.Errorf("resumed after page %d (-want +got):\n%s", i, diff)
				}
			}
		})
	}
}

func TestTREE_8_X_89_BadTokens(t *testing.T) {
	h := start(t)
	want := threeLevels(t, h)
	pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: want[0].Proto(), PageSize: 2})
	if err != nil {
		t.Fatalf("GetTree: %v", err)
	}
	good := pages[0].token
	raw := must(base64.RawURLEncoding.DecodeString(good))
	raw[len(raw)-1] ^= 1
	for row, req := range map[string]*repb.GetTreeRequest{
		"garbage":      {RootDigest: want[0].Proto(), PageToken: "garbage"},
		"empty base64": {RootDigest: want[0].Proto(), PageToken: "AAAA"},
		"tampered":     {RootDigest: want[0].Proto(), PageToken: base64.RawURLEncoding.EncodeToString(raw)},
		"cut":          {RootDigest: want[0].Proto(), PageToken: good[:len(good)-4]},
		"longer":       {RootDigest: want[0].Proto(), PageToken: good + "AAAA"},
		"foreign root": {RootDigest: want[1].Proto(), PageToken: good},
		"huge":         {RootDigest: want[0].Proto(), PageToken: strings.Repeat("A", 1<<20)},
	} {
		t.Run(row, func(t *testing.T) {
			_, err := h.tree(t.Context(), req)
			wantCode(t, "GetTree", err, codes.InvalidArgument, "page_token")
		})
	}
	t.Run("TREE-9 negative page_size", func(t *testing.T) {
		_, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: want[0].Proto(), PageSize: -1})
		wantCode(t, "GetTree", err, codes.InvalidArgument, "page_size")
	})
}

func TestTREE_3_TREE_10_X_78_MissingPartsAreLeftOut(t *testing.T) {
	h := start(t)
	kept := h.putMessage(t, leaf("kept"))
	text := h.put(t, []byte("no directory, since 0x6e is no tag of one")) // row TREE-10
	malformed := directory(kept)
	malformed.Directories = append(malformed.Directories, &repb.DirectoryNode{Name: "x", Digest: &repb.Digest{Hash: "zz"}}, &repb.DirectoryNode{Name: "y"})
	middle := h.putMessage(t, malformed)
	root := h.putMessage(t, directory(absent(), text, middle))
	pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: root.Proto()})
	if err != nil {
		t.Fatalf("GetTree: %v", err)
	}
	if diff := diffDigests([]digest.Digest{root, middle, kept}, all(pages)); diff != "" {
		t.Errorf("directories (-want +got):\n%s", diff)
	}
}

func TestTREE_Roots(t *testing.T) {
	h := start(t)
	for row, test := range map[string]struct {
		root *repb.Digest
		code codes.Code
	}{
		"TREE-1 absent":          {absent().Proto(), codes.NotFound},
		"TREE-10 no directory":   {h.put(t, []byte("text")).Proto(), codes.InvalidArgument},
		"TREE-1 absent and huge": {must(space.New(absent().Hash(), 1<<40)).Proto(), codes.NotFound},
		"GEN-11 nil":             {nil, codes.InvalidArgument},
		"GEN-8 malformed":        {&repb.Digest{Hash: "A", SizeBytes: 1}, codes.InvalidArgument},
	} {
		t.Run(row, func(t *testing.T) {
			_, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: test.root})
			wantCode(t, "GetTree", err, test.code)
		})
	}
	t.Run("TREE-12 GEN-20 empty", func(t *testing.T) {
		pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: emptyDigest.Proto()})
		if err != nil || len(pages) != 1 || len(pages[0].digests) != 1 || pages[0].token != "" {
			t.Errorf("GetTree = %v, %v, want one empty directory", pages, err)
		}
	})
}

// A graph of 40 levels in which each directory has the next twice: 2^40 paths, 41 directories.
func TestTREE_11_X_75_SharedDirectoriesOnce(t *testing.T) {
	h := start(t)
	d := h.putMessage(t, leaf("bottom"))
	for range 40 {
		d = h.putMessage(t, directory(d, d))
	}
	within(t, "GetTree", func() {
		pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: d.Proto()})
		if err != nil || len(all(pages)) != 41 {
			t.Fatalf("GetTree = %d directories, %v, want 41", len(all(pages)), err)
		}
	})
}

func TestTREE_14_GEN_27_X_73_MessagesFit(t *testing.T) {
	h := start(t)
	big := func(seed string, n int) *repb.Directory {
		d := &repb.Directory{}
		for i := range n {
			d.Files = append(d.Files, &repb.FileNode{Name: fmt.Sprintf("%s%06d", seed, i), Digest: emptyDigest.Proto()})
		}
		return d
	}
	a, b := h.putMessage(t, big("a", 30_000)), h.putMessage(t, big("b", 30_000)) // 2.5 MB each
	pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: h.putMessage(t, directory(a, b)).Proto()})
	if err != nil || len(pages) != 2 || len(all(pages)) != 3 {
		t.Errorf("GetTree = %d pages, %v, want two", len(pages), err)
	}
	huge := h.putMessage(t, big("c", 100_000))
	_, err = h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: h.putMessage(t, directory(huge)).Proto()})
	wantCode(t, "a directory that fits no message", err, codes.ResourceExhausted, huge.Hash())
}

func TestTREE_15_Bounds(t *testing.T) {
	for what, change := range map[string]func(*frontend.Config){
		"directories": func(c *frontend.Config) { c.Limits.MaxTreeDirectories = 12 },
		"bytes":       func(c *frontend.Config) { c.Limits.MaxTreeBytes = 500 },
	} {
		t.Run(what, func(t *testing.T) {
			h := start(t, change)
			root := threeLevels(t, h)[0]
			_, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: root.Proto()})
			wantCode(t, "GetTree", err, codes.ResourceExhausted, root.Hash())
		})
	}
}

// Row X-74: a chain as deep as it likes costs no stack.
func TestX_74_DeepTree(t *testing.T) {
	h := start(t, faulty(nil))
	d := h.putMessage(t, leaf("bottom"))
	for range 10_000 {
		d = h.putMessage(t, directory(d))
	}
	pages, err := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: d.Proto()})
	if err != nil || len(all(pages)) != 10_001 {
		t.Errorf("GetTree = %d directories, %v, want 10 001", len(all(pages)), err)
	}
}
