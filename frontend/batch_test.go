package frontend_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/digest"
)

func packedBlob(d digest.Digest, frames []byte) *repb.BatchUpdateBlobsRequest_Request {
	return &repb.BatchUpdateBlobsRequest_Request{Digest: d.Proto(), Data: frames, Compressor: repb.Compressor_ZSTD}
}

func TestCompressedBatchUpdate(t *testing.T) {
	h := start(t)
	const ok, bad = codes.OK, codes.InvalidArgument
	data := text(2000)
	d := space.Of(data)
	gib := must(space.New(absent().Hash(), 1<<30))
	over := must(space.New(absent().Hash(), 64<<30+1))
	var bombs []*repb.BatchUpdateBlobsRequest_Request
	var bombed []codes.Code
	bomb := pack(make([]byte, 1<<20))
	for range 4000 {
		bombs, bombed = append(bombs, packedBlob(absentOf(10), bomb)), append(bombed, bad)
	}
	zeros := make([]byte, 2<<20)
	var honest []*repb.BatchUpdateBlobsRequest_Request
	for i := range 32 {
		zeros[0] = byte(i)
		honest = append(honest, packedBlob(space.Of(zeros), pack(zeros)))
	}
	for _, test := range []struct {
		row  string
		ask  []*repb.BatchUpdateBlobsRequest_Request
		want []codes.Code
	}{
		{"BUB-7 the digest of the data", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(d, pack(data))}, []codes.Code{ok}},
		{"BUB-7 the digest of the frame", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(space.Of(pack(data)), pack(data))}, []codes.Code{bad}},
		{"BUB-7 without its size", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(d, packStream(data))}, []codes.Code{ok}},
		{"BUB-7 BUB-9 the empty blob", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(emptyDigest, pack(nil)), packedBlob(emptyDigest, nil)}, []codes.Code{ok, ok}},
		{"BUB-4 another blob", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(absentOf(2000), pack(data))}, []codes.Code{bad}},
		{"BUB-7 ZST-4 X-55 a byte behind the frame", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(d, append(pack(data), 'x'))}, []codes.Code{bad}},
		{"BUB-7 X-54 truncated", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(d, pack(data)[:20])}, []codes.Code{bad}},
		{"BUB-7 X-61 plain", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(d, data)}, []codes.Code{bad}},
		{"BUB-8 X-52 a frame that claims 1 GiB", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(gib, pack(data)), blob(data)}, []codes.Code{bad, ok}},
		{"BUB-15 X-37 above the largest blob", []*repb.BatchUpdateBlobsRequest_Request{packedBlob(over, pack(data)), {Digest: over.Proto()}, blob(data)}, []codes.Code{bad, bad, ok}},
		{"BUB-8 what decompresses to more than 16 batches", honest, append(slices.Repeat([]codes.Code{ok}, 30), ok, bad)},
		{"X-65 four thousand bombs", bombs, bombed},
		{"X-70 data swapped", []*repb.BatchUpdateBlobsRequest_Request{
			{Digest: space.Of([]byte("one")).Proto(), Data: []byte("two")}, {Digest: space.Of([]byte("two")).Proto(), Data: []byte("one")},
		}, []codes.Code{bad, bad}},
		{"GEN-16 X-10 hashes of several lengths", []*repb.BatchUpdateBlobsRequest_Request{
			blob(data), {Digest: &repb.Digest{Hash: strings.Repeat("a", 40), SizeBytes: 1}, Data: []byte("x")},
		}, []codes.Code{ok, bad}},
	} {
		t.Run(test.row, func(t *testing.T) {
			if diff := cmp.Diff(test.want, h.update(t, test.ask...)); diff != "" {
				t.Errorf("codes (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCompressedBatchRead(t *testing.T) {
	h := start(t)
	compressible, noise, tiny := text(5000), random(5000), []byte("tiny")
	ds := []digest.Digest{h.put(t, compressible), h.put(t, noise), h.put(t, tiny), emptyDigest}
	read := func(acceptable ...repb.Compressor_Value) []*repb.BatchReadBlobsResponse_Response {
		t.Helper()
		resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(ds...), AcceptableCompressors: acceptable})
		if err != nil {
			t.Fatalf("BatchReadBlobs: %v", err)
		}
		for i, want := range [][]byte{compressible, noise, tiny, nil} {
			if got := unpackResponse(t, resp.GetResponses()[i]); !bytes.Equal(got, want) {
				t.Errorf("blob %d has %d bytes, want %d", i, len(got), len(want))
			}
		}
		return resp.GetResponses()
	}
	t.Run("BRB-3 zstd where it is accepted and helps", func(t *testing.T) {
		for i, r := range read(repb.Compressor_BROTLI, repb.Compressor_ZSTD) {
			if want := i == 0; (r.GetCompressor() == repb.Compressor_ZSTD) != want {
				t.Errorf("blob %d is %v", i, r.GetCompressor())
			}
		}
	})
	t.Run("BRB-4 plain although only zstd is listed", func(t *testing.T) {
		if r := read(repb.Compressor_ZSTD)[1]; r.GetCompressor() != repb.Compressor_IDENTITY {
			t.Errorf("noise is %v", r.GetCompressor())
		}
	})
	for what, acceptable := range map[string][]repb.Compressor_Value{"none": nil, "what nobody knows": {77, repb.Compressor_BROTLI, repb.Compressor_DEFLATE}} {
		t.Run("BRB-3 BRB-5 plain for "+what, func(t *testing.T) {
			for i, r := range read(acceptable...) {
				if r.GetCompressor() != repb.Compressor_IDENTITY {
					t.Errorf("blob %d is %v", i, r.GetCompressor())
				}
			}
		})
	}
	t.Run("BRB-11 GEN-27 a whole batch of noise", func(t *testing.T) {
		d := h.put(t, random(batchLimit))
		resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(d), AcceptableCompressors: []repb.Compressor_Value{repb.Compressor_ZSTD}})
		if err != nil || len(resp.GetResponses()[0].GetData()) != batchLimit || proto.Size(resp) >= 4<<20 {
			t.Errorf("BatchReadBlobs: %d bytes, %v", proto.Size(resp), err)
		}
	})
}

func TestBatchesOfManyEntries(t *testing.T) {
	h := start(t, faulty(nil))
	t.Run("X-67 more digests than a batch may have", func(t *testing.T) {
		_, err := h.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: make([]*repb.BatchUpdateBlobsRequest_Request, 40_001)})
		wantCode(t, "BatchUpdateBlobs", err, codes.InvalidArgument, "40000")
		_, err = h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: make([]*repb.Digest, 40_001)})
		wantCode(t, "BatchReadBlobs", err, codes.InvalidArgument, "40000")
	})
	t.Run("X-68 one digest ten thousand times", func(t *testing.T) {
		d := h.put(t, random(1000))
		_, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: slices.Repeat(protos(d), 10_000)})
		wantCode(t, "BatchReadBlobs", err, codes.InvalidArgument, "4063232")
		resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: slices.Repeat(protos(d), 3000)})
		if err != nil || len(resp.GetResponses()) != 3000 {
			t.Errorf("BatchReadBlobs = %d responses, %v", len(resp.GetResponses()), err)
		}
	})
	t.Run("BRB-11 X-69 forty thousand blobs of a byte or so", func(t *testing.T) {
		var ds []*repb.Digest
		for i := range 40_000 {
			ds = append(ds, space.Of(fmt.Appendf(nil, "%d", i)).Proto())
		}
		for i := range 100 {
			h.put(t, fmt.Appendf(nil, "%d", i))
		}
		resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: ds})
		if err != nil || proto.Size(resp) >= 4<<20 {
			t.Fatalf("BatchReadBlobs: %d bytes, %v", proto.Size(resp), err)
		}
		if r := resp.GetResponses(); string(r[99].GetData()) != "99" || codes.Code(r[100].GetStatus().GetCode()) != codes.NotFound {
			t.Errorf("responses 99 and 100: %v, %v", r[99], r[100])
		}
	})
}

func TestVisibleAtOnce(t *testing.T) {
	h := start(t)
	data := random(1000)
	d := space.Of(data)
	t.Run("BUB-12 a blob of a batch", func(t *testing.T) {
		h.update(t, blob(data))
		if h.missing(t, d) {
			t.Error("the blob is missing")
		}
		if got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}); err != nil || !bytes.Equal(got, data) {
			t.Errorf("Read = %d bytes, %v", len(got), err)
		}
	})
	t.Run("BUB-4 X-26 a blob that was refused", func(t *testing.T) {
		wrong := absentOf(1000)
		h.update(t, &repb.BatchUpdateBlobsRequest_Request{Digest: wrong.Proto(), Data: data})
		if !h.missing(t, wrong) {
			t.Error("the blob is present")
		}
	})
}

// Digest functions besides SHA256.
func TestEveryDigestFunction(t *testing.T) {
	h := start(t)
	data := []byte("the same bytes under every function")
	of := func(fn repb.DigestFunction_Value) digest.Digest {
		return must(digest.SpaceOf("", fn, "")).Of(data)
	}
	sha256, blake3, sha1 := of(repb.DigestFunction_SHA256), of(repb.DigestFunction_BLAKE3), of(repb.DigestFunction_SHA1)
	find := func(t *testing.T, fn repb.DigestFunction_Value, ds ...digest.Digest) (int, error) {
		t.Helper()
		resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{DigestFunction: fn, BlobDigests: protos(ds...)})
		return len(resp.GetMissingBlobDigests()), err
	}
	for _, fn := range []repb.DigestFunction_Value{
		repb.DigestFunction_SHA256, repb.DigestFunction_BLAKE3, repb.DigestFunction_SHA1,
		repb.DigestFunction_SHA384, repb.DigestFunction_SHA512, repb.DigestFunction_SHA256TREE,
	} {
		t.Run("GEN-17 GEN-18 GEN-20 RD-1 WR-1 "+fn.String(), func(t *testing.T) {
			d := of(fn)
			if resp, err := h.write(t.Context(), chunks(uploadName(d), data, 10)...); err != nil || resp.GetCommittedSize() != d.Size() {
				t.Fatalf("Write = %v, %v", resp, err)
			}
			for _, name := range []string{d.String(), (digest.Read{Digest: d, Compressor: digest.Zstd}).String()} {
				got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: name})
				if strings.HasPrefix(name, "compressed") {
					got = must(unpack(got))
				}
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("Read(%q) = %q, %v", name, got, err)
				}
			}
			empty := must(digest.SpaceOf("", fn, "")).Of(nil)
			if n, err := find(t, fn, d, empty); err != nil || n != 0 {
				t.Errorf("FindMissingBlobs = %d, %v, want none", n, err)
			}
			resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{DigestFunction: fn, Digests: protos(d, empty)})
			if err != nil || string(resp.GetResponses()[0].GetData()) != string(data) || resp.GetResponses()[1].GetStatus().GetCode() != 0 {
				t.Errorf("BatchReadBlobs = %v, %v", resp, err)
			}
		})
	}
	t.Run("GEN-12 a hash of 40 digits is SHA1", func(t *testing.T) {
		if n, err := find(t, 0, sha1); err != nil || n != 0 {
			t.Errorf("FindMissingBlobs = %d, %v, want none", n, err)
		}
		resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(sha1)})
		if err != nil || string(resp.GetResponses()[0].GetData()) != string(data) {
			t.Errorf("BatchReadBlobs = %v, %v", resp, err)
		}
		if got := h.update(t, &repb.BatchUpdateBlobsRequest_Request{Digest: sha1.Proto(), Data: data}); got[0] != codes.OK {
			t.Errorf("BatchUpdateBlobs = %v", got)
		}
	})
	t.Run("GEN-12 a hash of 64 digits is SHA256", func(t *testing.T) {
		if n, err := find(t, 0, sha256); err != nil || n != 0 {
			t.Errorf("FindMissingBlobs = %d, %v, want none", n, err)
		}
	})
	t.Run("GEN-13 GEN-17 X-11 BLAKE3 is never inferred", func(t *testing.T) {
		if n, err := find(t, 0, blake3); err != nil || n != 1 {
			t.Errorf("FindMissingBlobs = %d, %v, want it missing", n, err)
		}
		_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: "blobs/" + blake3.Hash() + fmt.Sprint("/", len(data))})
		wantCode(t, "Read", err, codes.NotFound)
		_, err = h.read(t.Context(), &bytestream.ReadRequest{ResourceName: "blobs/blake3/" + sha256.Hash() + fmt.Sprint("/", len(data))})
		wantCode(t, "Read", err, codes.NotFound)
	})
	t.Run("GEN-16 X-10 functions mixed", func(t *testing.T) {
		_, err := find(t, 0, sha256, sha1)
		wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument)
		_, err = find(t, repb.DigestFunction_BLAKE3, blake3, sha1)
		wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument)
	})
	t.Run("ACG-10 X-104 an action of another function", func(t *testing.T) {
		action := h.action(t)
		h.cache(t, action, h.result(t))
		_, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
		wantCode(t, "GetActionResult", err, codes.OK)
		_, err = h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto(), DigestFunction: repb.DigestFunction_BLAKE3})
		wantCode(t, "GetActionResult by BLAKE3", err, codes.NotFound)
	})
}
