package frontend_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// batchLimit is the advertised max_batch_total_size_bytes.
const batchLimit = 4063232

var (
	emptyDigest      = space.Of(nil)
	impossibleDigest = must(space.New(strings.Repeat("a", 64), 0))
	emptyWithSize    = must(space.New(emptyDigest.Hash(), 5))
)

// faulty puts a store with faults under the frontend.
func faulty(plan func(op castest.Op, d digest.Digest) castest.Fault) func(*frontend.Config) {
	return func(c *frontend.Config) { c.Blobs = &castest.Faulty{Store: castest.NewMemory(), Plan: plan} }
}

func protos(ds ...digest.Digest) []*repb.Digest {
	out := []*repb.Digest{}
	for _, d := range ds {
		out = append(out, d.Proto())
	}
	return out
}

func TestFindMissingBlobs(t *testing.T) {
	h := start(t)
	p, q := h.put(t, random(100)), h.put(t, random(600<<10))
	m, n := absent(), absent()
	wrongSize := must(space.New(p.Hash(), p.Size()+1))
	for _, test := range []struct {
		name      string
		ask, want []digest.Digest
	}{
		{"FMB-1 only what is absent", []digest.Digest{p, m, q}, []digest.Digest{m}},
		{"FMB-4 nothing", nil, nil},
		{"FMB-5 duplicates once, in order", []digest.Digest{n, m, n, p, m}, []digest.Digest{n, m}},
		{"FMB-6 GEN-20 GEN-21 X-8 empty and impossible", []digest.Digest{emptyDigest, impossibleDigest, emptyWithSize}, []digest.Digest{impossibleDigest, emptyWithSize}},
		{"GEN-9 the size is part of the digest", []digest.Digest{wrongSize}, []digest.Digest{wrongSize}},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: protos(test.ask...)})
			if err != nil {
				t.Fatalf("FindMissingBlobs: %v", err)
			}
			if diff := cmp.Diff(protos(test.want...), append([]*repb.Digest{}, resp.GetMissingBlobDigests()...), protocmp.Transform()); diff != "" {
				t.Errorf("missing (-want +got):\n%s", diff)
			}
		})
	}
}

func TestGEN_7_InstancesAreSeparate(t *testing.T) {
	h := start(t)
	d := must(cas.PutBytes(t.Context(), h.blobs, must(digest.SpaceOf("a/b/c", repb.DigestFunction_SHA256, "")), random(10)))
	if h.missing(t, d) {
		t.Errorf("%v is missing in its instance", d)
	}
	for _, instance := range []string{"", "a/b", "b"} {
		resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{InstanceName: instance, BlobDigests: protos(d)})
		if err != nil || len(resp.GetMissingBlobDigests()) != 1 {
			t.Errorf("in instance %q: %v, %v, want it missing", instance, resp, err)
		}
	}
}

// badDigests are digests that every call refuses with INVALID_ARGUMENT.
func badDigests() map[string]*repb.Digest {
	hash := absent().Hash()
	return map[string]*repb.Digest{
		"GEN-8 X-1 upper case":   {Hash: strings.ToUpper(strings.Repeat("a", 64)), SizeBytes: 1},
		"X-3 not hex":            {Hash: strings.Repeat("g", 64), SizeBytes: 1},
		"X-3 path":               {Hash: "../../../../../../../../../../../../../../../../../../etc/passwd", SizeBytes: 1},
		"X-2 63 digits":          {Hash: hash[:63], SizeBytes: 1},
		"X-2 65 digits":          {Hash: hash + "0", SizeBytes: 1},
		"GEN-14 X-2 32 digits":   {Hash: hash[:32], SizeBytes: 1},
		"X-2 no digits":          {SizeBytes: 1},
		"GEN-10 X-4 negative":    {Hash: hash, SizeBytes: -1},
		"X-4 very negative":      {Hash: hash, SizeBytes: -1 << 63},
		"GEN-11 X-7 not present": nil,
	}
}

func TestFMB_3_BadDigests(t *testing.T) {
	h := start(t)
	p := h.put(t, []byte("present"))
	for row, bad := range badDigests() {
		t.Run(row, func(t *testing.T) {
			_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{p.Proto(), bad}})
			wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument)
		})
	}
	t.Run("GEN-15 X-9 unknown function", func(t *testing.T) {
		_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{DigestFunction: 77, BlobDigests: protos(p)})
		wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument, "sha256")
	})
	t.Run("X-71 too many", func(t *testing.T) {
		_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: make([]*repb.Digest, 40_001)})
		wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument, "40000")
	})
}

func TestFMB_7_ManyDigests(t *testing.T) {
	h := start(t)
	ds := make([]*repb.Digest, 20_000)
	for i := range ds {
		ds[i] = space.Of(fmt.Appendf(nil, "absent %d", i)).Proto()
	}
	within(t, "20 000 digests", func() {
		resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: ds})
		if err != nil || len(resp.GetMissingBlobDigests()) != len(ds) {
			t.Fatalf("FindMissingBlobs = %d digests, %v, want all", len(resp.GetMissingBlobDigests()), err)
		}
	})
}

func TestFMB_9_StoreIsDown(t *testing.T) {
	h := start(t, faulty(func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{Err: cas.ErrUnavailable} }))
	_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: protos(absent())})
	wantCode(t, "FindMissingBlobs", err, codes.Unavailable)
}

func TestGEN_28_FindMissingCancelled(t *testing.T) {
	h := start(t, faulty(func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{Stall: true} }))
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("enough"))
	defer cancel()
	within(t, "a stalled FindMissingBlobs", func() {
		_, err := h.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{BlobDigests: protos(absent())})
		wantCode(t, "FindMissingBlobs", err, codes.DeadlineExceeded)
	})
	eventually(t, "no handler left", func() bool { return handlers() == 0 })
}

// update sends a batch and returns its codes.
func (h *harness) update(t testing.TB, requests ...*repb.BatchUpdateBlobsRequest_Request) []codes.Code {
	t.Helper()
	resp, err := h.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: requests})
	if err != nil {
		t.Fatalf("BatchUpdateBlobs: %v", err)
	}
	if len(resp.GetResponses()) != len(requests) {
		t.Fatalf("%d responses to %d requests", len(resp.GetResponses()), len(requests))
	}
	got := make([]codes.Code, len(requests))
	for i, r := range resp.GetResponses() {
		if r.GetStatus() == nil {
			t.Fatalf("response %d has no status", i) // row BUB-2
		}
		if want := requests[i].GetDigest(); want != nil && !proto.Equal(r.GetDigest(), want) {
			t.Fatalf("response %d is for %v, want %v", i, r.GetDigest(), want)
		}
		got[i] = codes.Code(r.GetStatus().GetCode())
	}
	return got
}

func blob(data []byte) *repb.BatchUpdateBlobsRequest_Request {
	return &repb.BatchUpdateBlobsRequest_Request{Digest: space.Of(data).Proto(), Data: data}
}

func TestBatchUpdateBlobs(t *testing.T) {
	h := start(t)
	const ok, bad = codes.OK, codes.InvalidArgument
	a, b := blob(random(100)), blob(random(200))
	mismatch := &repb.BatchUpdateBlobsRequest_Request{Digest: absent().Proto(), Data: random(16)}
	for _, test := range []struct {
		name string
		ask  []*repb.BatchUpdateBlobsRequest_Request
		want []codes.Code
	}{
		{"BUB-2 BUB-3 BUB-14 independent", []*repb.BatchUpdateBlobsRequest_Request{a, mismatch, b}, []codes.Code{ok, bad, ok}},
		{"BUB-9 GEN-20 empty", []*repb.BatchUpdateBlobsRequest_Request{blob(nil)}, []codes.Code{ok}},
		{"BUB-10 present, right bytes", []*repb.BatchUpdateBlobsRequest_Request{a}, []codes.Code{ok}},
		{"BUB-10 present, wrong bytes", []*repb.BatchUpdateBlobsRequest_Request{{Digest: a.GetDigest(), Data: random(100)}}, []codes.Code{bad}},
		{"BUB-11 twice", []*repb.BatchUpdateBlobsRequest_Request{blob([]byte("x")), blob([]byte("x"))}, []codes.Code{ok, ok}},
		{"BUB-6 CAP-9 compressor", []*repb.BatchUpdateBlobsRequest_Request{{Digest: a.GetDigest(), Data: a.GetData(), Compressor: repb.Compressor_DEFLATE}}, []codes.Code{bad}},
		{"GEN-21 impossible", []*repb.BatchUpdateBlobsRequest_Request{{Digest: impossibleDigest.Proto()}, {Digest: emptyWithSize.Proto()}}, []codes.Code{bad, bad}},
		{"BUB-14 malformed first", []*repb.BatchUpdateBlobsRequest_Request{{Digest: &repb.Digest{Hash: "xyz", SizeBytes: 1}, Data: []byte("x")}, {}, b}, []codes.Code{bad, bad, ok}},
		{"nothing", nil, []codes.Code{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, h.update(t, test.ask...)); diff != "" {
				t.Errorf("codes (-want +got):\n%s", diff)
			}
		})
	}
	if h.missing(t, must(space.Parse(a.GetDigest()))) { // row BUB-12
		t.Error("an accepted blob is missing")
	}
	if !h.missing(t, must(space.Parse(mismatch.GetDigest()))) { // row BUB-4
		t.Error("a refused blob is present")
	}
}

func TestBUB_1_CAP_10_X_66_BatchLimit(t *testing.T) {
	h := start(t)
	exact := []*repb.BatchUpdateBlobsRequest_Request{blob(random(batchLimit - 1000)), blob(random(1000))}
	if diff := cmp.Diff([]codes.Code{codes.OK, codes.OK}, h.update(t, exact...)); diff != "" {
		t.Errorf("codes at the limit (-want +got):\n%s", diff)
	}
	over := []*repb.BatchUpdateBlobsRequest_Request{blob(random(batchLimit)), blob([]byte{1})}
	_, err := h.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{Requests: over})
	wantCode(t, "over the limit", err, codes.InvalidArgument, "4063232")
	if !h.missing(t, must(space.Parse(over[0].GetDigest()))) {
		t.Error("a blob of a refused batch is present")
	}
}

// Row BUB-13: the message is several times the batch limit, all of it overhead.
func TestBUB_13_ManyTinyBlobs(t *testing.T) {
	h := start(t, faulty(nil))
	requests := make([]*repb.BatchUpdateBlobsRequest_Request, 40_000)
	for i := range requests {
		requests[i] = blob(fmt.Appendf(nil, "%d", i))
		if i%2 == 1 { // each of these answers would like to carry a text
			requests[i].Data = []byte("wrong")
		}
	}
	got := h.update(t, requests...)
	if got[0] != codes.OK || got[1] != codes.InvalidArgument || got[39_999] != codes.InvalidArgument {
		t.Errorf("codes %v %v .. %v", got[0], got[1], got[39_999])
	}
}

func TestBUB_5_StoreIsFull(t *testing.T) {
	full := blob(random(10))
	h := start(t, faulty(func(op castest.Op, d digest.Digest) castest.Fault {
		if op == castest.OpPut && d.Hash() == full.GetDigest().GetHash() {
			return castest.Fault{After: -1, Err: cas.ErrFull}
		}
		return castest.Fault{}
	}))
	want := []codes.Code{codes.OK, codes.ResourceExhausted, codes.OK}
	if diff := cmp.Diff(want, h.update(t, blob(random(10)), full, blob(random(10)))); diff != "" {
		t.Errorf("codes (-want +got):\n%s", diff)
	}
}

func TestBatchReadBlobs(t *testing.T) {
	h := start(t)
	data := random(1000)
	p, m := h.put(t, data), absent()
	resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{
		Digests: append(protos(p, m, emptyDigest, p, impossibleDigest), &repb.Digest{Hash: "x", SizeBytes: 3}, nil),
		// What is not supported is ignored.
		AcceptableCompressors: []repb.Compressor_Value{77, repb.Compressor_BROTLI},
	})
	if err != nil {
		t.Fatalf("BatchReadBlobs: %v", err)
	}
	want := []struct {
		row  string
		code codes.Code
		data []byte
	}{
		{"BRB-3 BRB-5 BRB-6 BRB-7 BRB-8", codes.OK, data},
		{"BRB-2 BRB-9", codes.NotFound, nil},
		{"BRB-13 GEN-20", codes.OK, nil},
		{"BRB-6 again", codes.OK, data},
		{"GEN-21", codes.NotFound, nil},
		{"BRB-10", codes.InvalidArgument, nil},
		{"GEN-11", codes.InvalidArgument, nil},
	}
	if len(resp.GetResponses()) != len(want) {
		t.Fatalf("%d responses, want %d", len(resp.GetResponses()), len(want))
	}
	for i, r := range resp.GetResponses() {
		if r.GetStatus() == nil || codes.Code(r.GetStatus().GetCode()) != want[i].code || string(r.GetData()) != string(want[i].data) ||
			r.GetCompressor() != repb.Compressor_IDENTITY {
			t.Errorf("%s: %v with %d bytes, want %v with %d", want[i].row, r.GetStatus(), len(r.GetData()), want[i].code, len(want[i].data))
		}
	}
}

func TestBRB_1_BatchLimit(t *testing.T) {
	h := start(t)
	for row, ds := range map[string][]digest.Digest{
		"BRB-1 over": {must(space.New(absent().Hash(), batchLimit)), must(space.New(absent().Hash(), 1))},
		"X-5 sum":    {must(space.New(absent().Hash(), 1<<62)), must(space.New(absent().Hash(), 1<<62)), must(space.New(absent().Hash(), 1<<62))},
	} {
		_, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(ds...)})
		wantCode(t, row, err, codes.InvalidArgument, "4063232")
	}
}

// Row BRB-11: the answer stays below what clients receive, and makes progress.
func TestBRB_11_X_69_GEN_27_AnswerFits(t *testing.T) {
	h := start(t, faulty(nil), func(c *frontend.Config) {
		c.Limits.MaxResponseBytes, c.Limits.MaxBatchBytes, c.Limits.MaxDigests, c.Limits.MaxResultBytes = 256<<10, 250<<10, 3000, 128<<10
	})
	var ds []digest.Digest
	for range 2500 {
		ds = append(ds, h.put(t, random(100)))
	}
	resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(ds...)})
	if err != nil {
		t.Fatalf("BatchReadBlobs: %v", err)
	}
	if n := proto.Size(resp); n > 256<<10 {
		t.Errorf("the answer has %d bytes, want at most %d", n, 256<<10)
	}
	count := map[codes.Code]int{}
	for _, r := range resp.GetResponses() {
		count[codes.Code(r.GetStatus().GetCode())]++
	}
	if count[codes.OK] == 0 || count[codes.ResourceExhausted] == 0 || count[codes.OK]+count[codes.ResourceExhausted] != len(ds) {
		t.Errorf("codes %v, want some OK and the rest RESOURCE_EXHAUSTED", count)
	}
	if resp.GetResponses()[0].GetStatus().GetCode() != 0 {
		t.Errorf("the first is %v, want OK", resp.GetResponses()[0].GetStatus())
	}
}

// damaged is a store whose blobs break in the middle of a read.
func damaged(op castest.Op, _ digest.Digest) castest.Fault {
	if op == castest.OpOpen {
		return castest.Fault{After: 50, Err: fmt.Errorf("%w: of a test", cas.ErrMismatch)}
	}
	return castest.Fault{}
}

func TestRD_13_BRB_9_DamagedBlobInBatch(t *testing.T) {
	h := start(t, faulty(damaged))
	resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(h.put(t, random(100)))})
	if err != nil {
		t.Fatalf("BatchReadBlobs: %v", err)
	}
	r := resp.GetResponses()[0]
	if codes.Code(r.GetStatus().GetCode()) != codes.DataLoss || len(r.GetData()) != 0 { // and row BRB-9
		t.Errorf("status %v with %d bytes, want DATA_LOSS without data", r.GetStatus(), len(r.GetData()))
	}
}
