package frontend_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// find asks for one digest and tells whether it is missing.
func (h *harness) find(t *testing.T, function repb.DigestFunction_Value, d *repb.Digest) bool {
	t.Helper()
	resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{DigestFunction: function, BlobDigests: []*repb.Digest{d}})
	if err != nil {
		t.Fatalf("FindMissingBlobs(%v, %v): %v", function, d, err)
	}
	return len(resp.GetMissingBlobDigests()) == 1
}

func TestDigestFunctions(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.AllowActionCacheUpdates = true })
	for _, f := range digest.Functions() {
		space := must(digest.SpaceOf("", f.Proto(), ""))
		streamed, batched := random(2<<20+5), random(1000)
		ds, db := space.Of(streamed), space.Of(batched)
		command := must(cas.PutBytes(t.Context(), h.blobs, space, encode(&repb.Command{Arguments: []string{f.String()}})))
		action := must(cas.PutBytes(t.Context(), h.blobs, space, encode(&repb.Action{CommandDigest: command.Proto(), InputRootDigest: ds.Proto()})))
		t.Run(fmt.Sprintf("GEN-20 the empty blob of %v", f), func(t *testing.T) {
			empty := space.Of(nil)
			if h.find(t, f.Proto(), empty.Proto()) {
				t.Error("it is missing")
			}
			if got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: empty.String()}); err != nil || len(got) != 0 {
				t.Errorf("Read = %d bytes, %v", len(got), err)
			}
			resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{DigestFunction: f.Proto(), Digests: protos(empty)})
			if err != nil || len(resp.GetResponses()) != 1 || resp.GetResponses()[0].GetStatus().GetCode() != 0 {
				t.Errorf("BatchReadBlobs = %v, %v", resp, err)
			}
		})
		t.Run(fmt.Sprintf("GEN-18 %v in every call", f), func(t *testing.T) {
			w, err := h.write(t.Context(), chunks(uploadName(ds), streamed, 1<<20)...)
			if err != nil || w.GetCommittedSize() != ds.Size() {
				t.Fatalf("Write = %v, %v", w, err)
			}
			status, err := h.bytes.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: uploadName(ds)})
			if err != nil || !status.GetComplete() {
				t.Errorf("QueryWriteStatus = %v, %v", status, err)
			}
			u, err := h.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{
				DigestFunction: f.Proto(), Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: db.Proto(), Data: batched}},
			})
			if err != nil || u.GetResponses()[0].GetStatus().GetCode() != 0 {
				t.Fatalf("BatchUpdateBlobs = %v, %v", u, err)
			}
			for d, want := range map[digest.Digest][]byte{ds: streamed, db: batched} {
				if h.find(t, f.Proto(), d.Proto()) {
					t.Errorf("%v is missing", d)
				}
				got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("Read(%v) = %d bytes, %v", d, len(got), err)
				}
				b, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{DigestFunction: f.Proto(), Digests: protos(d)})
				if err != nil || !bytes.Equal(b.GetResponses()[0].GetData(), want) {
					t.Errorf("BatchReadBlobs(%v): %v", d, err)
				}
			}
			if _, err = h.write(t.Context(), chunks(uploadName(space.Of(random(50))), random(50), 50)...); err == nil {
				t.Error("a Write of other bytes succeeded")
			}
			root := encode(&repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: db.Proto()}}})
			dr := must(cas.PutBytes(t.Context(), h.blobs, space, root))
			stream, err := h.cas.GetTree(t.Context(), &repb.GetTreeRequest{DigestFunction: f.Proto(), RootDigest: dr.Proto()})
			if err != nil {
				t.Fatalf("GetTree: %v", err)
			}
			if page, err := stream.Recv(); err != nil || len(page.GetDirectories()) != 1 {
				t.Errorf("GetTree = %v, %v", page, err)
			}
			result := &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "f", Digest: db.Proto()}}, ExitCode: int32(f)}
			if _, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{DigestFunction: f.Proto(), ActionDigest: action.Proto(), ActionResult: result}); err != nil {
				t.Fatalf("UpdateActionResult: %v", err)
			}
			if got, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{DigestFunction: f.Proto(), ActionDigest: action.Proto()}); err != nil || !proto.Equal(got, result) {
				t.Errorf("GetActionResult = %v, %v", got, err)
			}
		})
		for _, other := range digest.Functions() {
			foreign, err := must(digest.SpaceOf("", other.Proto(), "")).New(ds.Hash(), ds.Size())
			if err != nil || other == f {
				continue
			}
			t.Run(fmt.Sprintf("GEN-17 the hash of %v as %v", f, other), func(t *testing.T) {
				if !h.find(t, other.Proto(), foreign.Proto()) {
					t.Error("it is present")
				}
				_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: foreign.String()})
				wantCode(t, "Read", err, codes.NotFound)
				_, err = h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{DigestFunction: other.Proto(), ActionDigest: action.Proto()})
				wantCode(t, "GetActionResult", err, codes.NotFound)
			})
		}
		t.Run(fmt.Sprintf("GEN-12 GEN-13 GEN-14 X-11 %v left out", f), func(t *testing.T) {
			_, path, _ := strings.Cut(ds.Blob(), f.String()+"/") // only these have a component
			hidden := path != ""
			if got := h.find(t, repb.DigestFunction_UNKNOWN, ds.Proto()); got != hidden {
				t.Errorf("missing %t, want %t", got, hidden)
			}
		})
		t.Run(fmt.Sprintf("GEN-16 one function with %v first", f), func(t *testing.T) {
			for _, other := range digest.Functions() {
				mixed := protos(ds, must(digest.SpaceOf("", other.Proto(), "")).Of(batched))
				_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{DigestFunction: f.Proto(), BlobDigests: mixed})
				if other.HexLen() != f.HexLen() {
					wantCode(t, other.String(), err, codes.InvalidArgument)
				} else if err != nil {
					t.Errorf("%v: %v", other, err)
				}
			}
		})
	}
	t.Run("GEN-15 functions that are not offered", func(t *testing.T) {
		hash := random(16)
		for _, f := range []repb.DigestFunction_Value{
			repb.DigestFunction_MD5, repb.DigestFunction_VSO, repb.DigestFunction_MURMUR3, repb.DigestFunction_GITSHA1, 77, -1, 256 + repb.DigestFunction_BLAKE3,
		} {
			_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{DigestFunction: f, BlobDigests: protos(space.Of(hash))})
			wantCode(t, f.String(), err, codes.InvalidArgument, "blake3")
		}
	})
	t.Run("GEN-18 components that must be left out or lower case", func(t *testing.T) {
		long := strings.Repeat("ab", 64)
		for component, digits := range map[string]int{
			"sha256": 64, "sha1": 40, "sha384": 96, "sha512": 128, "BLAKE3": 64, "Sha256tree": 64, "md5": 32, "gitsha1": 40, "vso": 64, "murmur3": 32,
		} {
			_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: "blobs/" + component + "/" + long[:digits] + "/7"})
			wantCode(t, component, err, codes.InvalidArgument)
			_, err = h.write(t.Context(), chunks("uploads/1b4e28ba-2fa1-11d2-883f-0016d3cca427/blobs/"+component+"/"+long[:digits]+"/7", random(7), 7)...)
			wantCode(t, component, err, codes.InvalidArgument)
		}
	})
}

// Answers with the longest hashes stay below what clients receive, whatever hashes they ask with.
func TestLongHashesFit(t *testing.T) {
	h := start(t)
	long := strings.Repeat("ab", 64)
	ask := func(n int) []*repb.Digest {
		ds := make([]*repb.Digest, n)
		for i := range ds {
			ds[i] = &repb.Digest{Hash: fmt.Sprintf("%016x", i) + long[16:], SizeBytes: 1 << 62}
		}
		return ds
	}
	const most, over = 27_000, 28_000
	t.Run("GEN-27 X-71 FindMissingBlobs", func(t *testing.T) {
		resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: ask(most)})
		if err != nil || len(resp.GetMissingBlobDigests()) != most || proto.Size(resp) > 4<<20-64<<10 {
			t.Errorf("%d digests in %d bytes, %v", len(resp.GetMissingBlobDigests()), proto.Size(resp), err)
		}
		_, err = h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: ask(over)})
		wantCode(t, "one too many", err, codes.InvalidArgument, "sha512")
	})
	t.Run("GEN-27 batches", func(t *testing.T) {
		for _, f := range []repb.DigestFunction_Value{repb.DigestFunction_UNKNOWN, repb.DigestFunction_SHA256} {
			_, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{DigestFunction: f, Digests: ask(over)})
			wantCode(t, "BatchReadBlobs", err, codes.InvalidArgument)
			update := &repb.BatchUpdateBlobsRequest{DigestFunction: f}
			for _, d := range ask(most) {
				update.Requests = append(update.Requests, &repb.BatchUpdateBlobsRequest_Request{Digest: d})
			}
			resp, err := h.cas.BatchUpdateBlobs(t.Context(), update)
			if err != nil || len(resp.GetResponses()) != most || proto.Size(resp) > 4<<20-64<<10 {
				t.Errorf("BatchUpdateBlobs: %d answers in %d bytes, %v", len(resp.GetResponses()), proto.Size(resp), err)
			}
		}
	})
}
