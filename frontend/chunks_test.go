package frontend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/chunking"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// smallChunks are parameters with which little data has many chunks.
var smallChunks = chunking.Params{Average: 16 << 10}

func withChunks(p chunking.Params) func(*frontend.Config) {
	return func(c *frontend.Config) { c.Chunks = &p }
}

// mapping calls GetChunkMapping and returns all messages.
func (h *harness) mapping(ctx context.Context, req *repb.GetChunkMappingRequest) ([]*repb.GetChunkMappingResponse, error) {
	stream, err := h.cas.GetChunkMapping(ctx, req)
	if err != nil {
		return nil, err
	}
	var pages []*repb.GetChunkMappingResponse
	for {
		page, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return pages, nil
		}
		if err != nil {
			return pages, err
		}
		pages = append(pages, page)
	}
}

// chunksOf splits a blob with both calls, which have to agree.
func (h *harness) chunksOf(t *testing.T, d digest.Digest) []*repb.Digest {
	t.Helper()
	f := d.Space().Function().Proto()
	split, err := h.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{BlobDigest: d.Proto(), DigestFunction: f, InstanceName: d.Space().Instance()})
	if err != nil {
		t.Fatalf("SplitBlob: %v", err)
	}
	pages, err := h.mapping(t.Context(), &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: f, InstanceName: d.Space().Instance()})
	if err != nil || len(pages) == 0 || pages[0].GetChunkingFunction() != repb.ChunkingFunction_FAST_CDC_2020 || split.GetChunkingFunction() != repb.ChunkingFunction_FAST_CDC_2020 {
		t.Fatalf("GetChunkMapping: %d messages, %v", len(pages), err)
	}
	var mapped []*repb.Digest
	for i, page := range pages {
		if i > 0 && page.GetChunkingFunction() != 0 {
			t.Errorf("message %d names the function again", i)
		}
		mapped = append(mapped, page.GetChunkDigests()...)
	}
	if diff := diffLists(split.GetChunkDigests(), mapped); diff != "" {
		t.Fatalf("SplitBlob and GetChunkMapping differ:\n%s", diff)
	}
	return mapped
}

func diffLists(a, b []*repb.Digest) string {
	text := func(ds []*repb.Digest) (out []string) {
		for _, d := range ds {
			out = append(out, fmt.Sprintf("%s/%d", d.GetHash(), d.GetSizeBytes()))
		}
		return out
	}
	return cmp.Diff(text(a), text(b))
}

func TestSplit(t *testing.T) {
	h := start(t, withChunks(smallChunks))
	for _, f := range digest.Functions() {
		space := must(digest.SpaceOf("split/it", f.Proto(), ""))
		for _, size := range []int{0, 1, 4 << 10, 16 << 10, 64<<10 + 1, 3<<20 + 7} {
			t.Run(fmt.Sprintf("CHK-2 CHK-3 CHK-4 CHK-20 %d bytes of %v", size, f), func(t *testing.T) {
				data := random(size)
				d := must(cas.PutBytes(t.Context(), h.blobs, space, data))
				var whole []byte
				for i, m := range h.chunksOf(t, d) {
					chunk, err := space.Parse(m)
					if err != nil || chunk.Size() == 0 || chunk.Size() > int64(smallChunks.Max()) {
						t.Fatalf("chunk %d is %v, %v", i, m, err)
					}
					got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: chunk.String()})
					if err != nil {
						t.Fatalf("Read(%v): %v", chunk, err)
					}
					whole = append(whole, got...)
				}
				if !bytes.Equal(whole, data) {
					t.Errorf("the chunks have %d bytes that differ from the %d of the blob", len(whole), size)
				}
			})
		}
	}
	t.Run("CHK-7 cut as the capabilities say", func(t *testing.T) {
		caps, err := h.caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		params := caps.GetCacheCapabilities().GetFastCdc_2020Params()
		c := chunking.New(chunking.Params{Average: int(params.GetAvgChunkSizeBytes()), Seed: params.GetSeed()})
		data := random(2 << 20)
		for i, m := range h.chunksOf(t, h.put(t, data)) {
			n := c.Cut(data)
			if int64(n) != m.GetSizeBytes() {
				t.Fatalf("chunk %d has %d bytes, want %d", i, m.GetSizeBytes(), n)
			}
			data = data[n:]
		}
		if len(data) > 0 {
			t.Errorf("%d bytes are in no chunk", len(data))
		}
	})
	t.Run("CHK-5 CHK-8 GEN-11 X-6 wrong requests", func(t *testing.T) {
		sha := repb.DigestFunction_SHA256
		present := h.put(t, random(100))
		for what, test := range map[string]struct {
			req  *repb.GetChunkMappingRequest
			code codes.Code
		}{
			"absent":           {&repb.GetChunkMappingRequest{BlobDigest: absent().Proto(), DigestFunction: sha}, codes.NotFound},
			"impossible":       {&repb.GetChunkMappingRequest{BlobDigest: impossibleDigest.Proto(), DigestFunction: sha}, codes.NotFound},
			"other instance":   {&repb.GetChunkMappingRequest{BlobDigest: present.Proto(), DigestFunction: sha, InstanceName: "x"}, codes.NotFound},
			"any function":     {&repb.GetChunkMappingRequest{BlobDigest: present.Proto(), DigestFunction: sha, ChunkingFunction: 77}, codes.OK},
			"other function":   {&repb.GetChunkMappingRequest{BlobDigest: present.Proto(), DigestFunction: sha, ChunkingFunction: repb.ChunkingFunction_REP_MAX_CDC}, codes.OK},
			"no digest":        {&repb.GetChunkMappingRequest{DigestFunction: sha}, codes.InvalidArgument},
			"unknown function": {&repb.GetChunkMappingRequest{BlobDigest: present.Proto(), DigestFunction: 77}, codes.InvalidArgument},
		} {
			_, err := h.mapping(t.Context(), test.req)
			wantCode(t, "GetChunkMapping, "+what, err, test.code)
			_, err = h.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{
				BlobDigest: test.req.GetBlobDigest(), DigestFunction: test.req.GetDigestFunction(), InstanceName: test.req.GetInstanceName(), ChunkingFunction: test.req.GetChunkingFunction(),
			})
			wantCode(t, "SplitBlob, "+what, err, test.code)
		}
		for row, bad := range badDigests() {
			_, err := h.mapping(t.Context(), &repb.GetChunkMappingRequest{BlobDigest: bad, DigestFunction: sha})
			wantCode(t, row, err, codes.InvalidArgument)
		}
	})
	t.Run("CHK-18 no digest function", func(t *testing.T) {
		d := h.put(t, random(100))
		_, err := h.mapping(t.Context(), &repb.GetChunkMappingRequest{BlobDigest: d.Proto()})
		wantCode(t, "GetChunkMapping", err, codes.InvalidArgument)
		if _, err := h.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{BlobDigest: d.Proto()}); err != nil {
			t.Errorf("SplitBlob: %v", err)
		}
	})
}

// A list is as long as the blob asks for; a message is not.
func TestSplitLongLists(t *testing.T) {
	h := start(t, withChunks(chunking.Params{Average: 1 << 10}), func(c *frontend.Config) {
		c.Limits.MaxResponseBytes, c.Limits.MaxBatchBytes, c.Limits.MaxDigests, c.Limits.MaxResultBytes = 256<<10, 250<<10, 2000, 128<<10
		c.Limits.MaxChunks, c.Limits.ChunkCalls = 8_000, 1
	})
	get := func(d digest.Digest) ([]*repb.GetChunkMappingResponse, error) {
		return h.mapping(t.Context(), &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256})
	}
	d := h.put(t, random(6<<20))
	t.Run("CHK-17 pages", func(t *testing.T) {
		for range 2 { // computed, and remembered
			pages, err := get(d)
			total := 0
			for _, page := range pages {
				total += len(page.GetChunkDigests())
				if proto.Size(page) > 4<<20-64<<10 {
					t.Errorf("a message of %d bytes", proto.Size(page))
				}
			}
			if err != nil || len(pages) < 2 || total < 4000 {
				t.Errorf("%d chunks in %d messages, %v", total, len(pages), err)
			}
		}
	})
	t.Run("GEN-27 too long for one message", func(t *testing.T) {
		_, err := h.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{BlobDigest: d.Proto()})
		wantCode(t, "SplitBlob", err, codes.ResourceExhausted, "GetChunkMapping")
	})
	t.Run("CHK-21 too many chunks", func(t *testing.T) {
		_, err := get(h.put(t, random(11<<20)))
		wantCode(t, "GetChunkMapping", err, codes.ResourceExhausted, "8000")
	})
}

// What goes wrong in the store has the code of its own.
func TestSplitFailures(t *testing.T) {
	memory := castest.NewMemory()
	var plan func(castest.Op, digest.Digest) castest.Fault
	faulty := &castest.Faulty{Store: memory, Plan: func(op castest.Op, d digest.Digest) castest.Fault {
		if plan == nil {
			return castest.Fault{}
		}
		return plan(op, d)
	}}
	h := start(t, withChunks(smallChunks), func(c *frontend.Config) { c.Blobs = faulty })
	d := h.put(t, random(1<<20))
	split := func() error {
		_, err := h.mapping(t.Context(), &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256})
		return err
	}
	t.Run("CHK-6 no room", func(t *testing.T) {
		plan = func(op castest.Op, _ digest.Digest) castest.Fault {
			if op == castest.OpPut {
				return castest.Fault{After: -1, Err: cas.ErrFull}
			}
			return castest.Fault{}
		}
		wantCode(t, "GetChunkMapping", split(), codes.ResourceExhausted)
	})
	t.Run("RD-13 a damaged blob", func(t *testing.T) {
		plan = nil
		bad := random(1 << 20)
		memory.Corrupt(d, bad)
		wantCode(t, "GetChunkMapping", split(), codes.DataLoss)
	})
	t.Run("CHK-5 CHK-19 chunks that were evicted come back", func(t *testing.T) {
		d := h.put(t, random(1<<20))
		chunks := h.chunksOf(t, d)
		gone := must(space.Parse(chunks[3]))
		memory.Remove(gone)
		if diff := diffLists(chunks, h.chunksOf(t, d)); diff != "" {
			t.Errorf("another list:\n%s", diff)
		}
		if h.missing(t, gone) {
			t.Error("a chunk is missing after GetChunkMapping")
		}
		memory.Remove(d)
		_, err := h.mapping(t.Context(), &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256})
		wantCode(t, "GetChunkMapping without the blob", err, codes.NotFound)
	})
}

func TestChunkCapabilities(t *testing.T) {
	settings := map[string]*chunking.Params{"on": {Average: 1 << 20, Seed: 7}, "off": nil}
	for name, params := range settings {
		t.Run("CAP-17 CAP-18 CHK-1 chunks are "+name, func(t *testing.T) {
			h := start(t, func(c *frontend.Config) { c.Chunks = params })
			caps, err := h.caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			cache, high := caps.GetCacheCapabilities(), caps.GetHighApiVersion()
			if on := params != nil; cache.GetSplitBlobSupport() != on || cache.GetSpliceBlobSupport() != on || (cache.GetFastCdc_2020Params() != nil) != on {
				t.Errorf("capabilities are %v", cache)
			}
			if high.GetMajor() != 2 || high.GetMinor() != 13 || cache.GetRepMaxCdcParams() != nil {
				t.Errorf("high_api_version is %v", high)
			}
			d := h.put(t, random(100))
			_, errSplit := h.cas.SplitBlob(t.Context(), &repb.SplitBlobRequest{BlobDigest: d.Proto()})
			_, errGet := h.mapping(t.Context(), &repb.GetChunkMappingRequest{BlobDigest: d.Proto(), DigestFunction: repb.DigestFunction_SHA256})
			errSplice, errRegister := h.splice(t.Context(), d, d.Proto()), h.register(t.Context(), d, d.Proto())
			code := codes.OK
			if params == nil {
				code = codes.Unimplemented
			} else if p := cache.GetFastCdc_2020Params(); p.GetAvgChunkSizeBytes() != 1<<20 || p.GetSeed() != 7 {
				t.Errorf("parameters are %v", p)
			}
			for i, err := range []error{errSplit, errGet, errSplice, errRegister} {
				wantCode(t, fmt.Sprintf("call %d", i), err, code)
			}
		})
	}
}
