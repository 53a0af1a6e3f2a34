package frontend_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// splice calls SpliceBlob.
func (h *harness) splice(ctx context.Context, d digest.Digest, chunks ...*repb.Digest) error {
	resp, err := h.cas.SpliceBlob(ctx, &repb.SpliceBlobRequest{
		BlobDigest: d.Proto(), ChunkDigests: chunks, DigestFunction: d.Space().Function().Proto(), InstanceName: d.Space().Instance(),
	})
	if err == nil && !proto.Equal(resp.GetBlobDigest(), d.Proto()) {
		return fmt.Errorf("blob_digest is %v", resp.GetBlobDigest())
	}
	return err
}

// registerMessages sends messages and half-closes.
func (h *harness) registerMessages(ctx context.Context, messages ...*repb.RegisterChunkMappingRequest) (*repb.RegisterChunkMappingResponse, error) {
	stream, err := h.cas.RegisterChunkMapping(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		if err := stream.Send(m); err != nil {
			break // CloseAndRecv has the reason.
		}
	}
	return stream.CloseAndRecv()
}

// register is splice with RegisterChunkMapping, a few chunks in a message.
func (h *harness) register(ctx context.Context, d digest.Digest, chunks ...*repb.Digest) error {
	messages := []*repb.RegisterChunkMappingRequest{{BlobDigest: d.Proto(), DigestFunction: d.Space().Function().Proto(), InstanceName: d.Space().Instance()}}
	for ; len(chunks) > 0; chunks = chunks[min(3, len(chunks)):] {
		messages = append(messages, &repb.RegisterChunkMappingRequest{ChunkDigests: chunks[:min(3, len(chunks))]})
	}
	resp, err := h.registerMessages(ctx, messages...)
	if err == nil && !proto.Equal(resp.GetBlobDigest(), d.Proto()) {
		return fmt.Errorf("blob_digest is %v", resp.GetBlobDigest())
	}
	return err
}

func TestSplice(t *testing.T) {
	h := start(t, withChunks(smallChunks), func(c *frontend.Config) {
		c.Limits.MaxChunks, c.Limits.MaxBlobBytes = 50, 8<<20
		c.Instances = frontend.Instances{"", "in"}
	})
	for call, splice := range map[string]func(context.Context, digest.Digest, ...*repb.Digest) error{"SpliceBlob": h.splice, "RegisterChunkMapping": h.register} {
		parts := [][]byte{random(100), random(700_000), random(1), random(1 << 20), random(3)}
		upload := func(space digest.Space) (chunks []*repb.Digest, whole digest.Digest, data []byte) {
			for _, part := range parts {
				chunks = append(chunks, must(cas.PutBytes(t.Context(), h.blobs, space, part)).Proto())
			}
			data = bytes.Join(parts, nil)
			return chunks, space.Of(data), data
		}
		for _, f := range digest.Functions() {
			t.Run(fmt.Sprintf("CHK-9 CHK-11 %s in %v", call, f), func(t *testing.T) {
				chunks, whole, data := upload(must(digest.SpaceOf("in", f.Proto(), "")))
				for range 2 {
					if err := splice(t.Context(), whole, chunks...); err != nil {
						t.Fatal(err)
					}
				}
				got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: whole.String()})
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			})
		}
		parts[0] = random(100)
		chunks, whole, _ := upload(space)
		swapped := []*repb.Digest{chunks[1], chunks[0], chunks[2], chunks[3], chunks[4]}
		long := make([]*repb.Digest, 51)
		for i := range long {
			long[i] = chunks[2]
		}
		lost := absent()
		for name, test := range map[string]struct {
			blob   digest.Digest
			chunks []*repb.Digest
			code   codes.Code
		}{
			"CHK-9 wrong order":           {whole, swapped, codes.InvalidArgument},
			"CHK-10 a chunk is missing":   {space.Of(random(116)), []*repb.Digest{chunks[0], lost.Proto()}, codes.NotFound},
			"CHK-21 too short":            {whole, chunks[:4], codes.InvalidArgument},
			"CHK-21 too long":             {whole, append(chunks[:5:5], chunks[2]), codes.InvalidArgument},
			"CHK-21 sum overflows":        {whole, []*repb.Digest{must(space.New(lost.Hash(), 1<<62)).Proto(), must(space.New(lost.Hash(), 1<<62)).Proto(), must(space.New(lost.Hash(), 1<<62)).Proto()}, codes.InvalidArgument},
			"CHK-21 too many":             {must(space.New(whole.Hash(), 51)), long, codes.ResourceExhausted},
			"CHK-21 no chunks":            {whole, nil, codes.InvalidArgument},
			"GEN-16 chunk of another":     {whole, append(chunks[:4:4], must(digest.SpaceOf("", repb.DigestFunction_SHA1, "")).Of(parts[4]).Proto()), codes.InvalidArgument},
			"GEN-11 a chunk is nil":       {whole, append(chunks[:4:4], nil), codes.InvalidArgument},
			"GEN-21 impossible blob":      {impossibleDigest, nil, codes.InvalidArgument},
			"CAP-11 above the limit":      {must(space.New(whole.Hash(), 8<<20+1)), chunks, codes.InvalidArgument},
			"GEN-21 the chunk impossible": {whole, append(chunks[:5:5], impossibleDigest.Proto()), codes.NotFound},
		} {
			t.Run(name+" "+call, func(t *testing.T) {
				wantCode(t, call, splice(t.Context(), test.blob, test.chunks...), test.code)
				if !h.missing(t, test.blob) {
					t.Error("the blob is there")
				}
			})
		}
		t.Run("GEN-20 the empty blob "+call, func(t *testing.T) {
			if err := splice(t.Context(), space.Of(nil)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRegisterChunkMapping(t *testing.T) {
	h := start(t, withChunks(smallChunks), func(c *frontend.Config) { c.Instances = frontend.Instances{"in"} })
	space := must(digest.SpaceOf("in", repb.DigestFunction_SHA256, ""))
	sha := repb.DigestFunction_SHA256
	upload := func() (a, b *repb.Digest, whole digest.Digest) {
		first, second := random(1000), random(2000)
		a, b = must(cas.PutBytes(t.Context(), h.blobs, space, first)).Proto(), must(cas.PutBytes(t.Context(), h.blobs, space, second)).Proto()
		return a, b, space.Of(append(first, second...))
	}
	t.Run("CHK-13 CHK-15 only the first message says what it is", func(t *testing.T) {
		a, b, whole := upload()
		resp, err := h.registerMessages(t.Context(),
			&repb.RegisterChunkMappingRequest{InstanceName: "in", BlobDigest: whole.Proto(), DigestFunction: sha},
			&repb.RegisterChunkMappingRequest{InstanceName: "other", BlobDigest: absent().Proto(), DigestFunction: 77, ChunkDigests: []*repb.Digest{a}},
			&repb.RegisterChunkMappingRequest{},
			&repb.RegisterChunkMappingRequest{ChunkDigests: []*repb.Digest{b}})
		if err != nil || !proto.Equal(resp.GetBlobDigest(), whole.Proto()) || h.missing(t, whole) {
			t.Errorf("RegisterChunkMapping = %v, %v", resp, err)
		}
	})
	t.Run("CHK-14 the first message is wrong", func(t *testing.T) {
		a, b, whole := upload()
		chunks := []*repb.Digest{a, b}
		for what, messages := range map[string][]*repb.RegisterChunkMappingRequest{
			"none":        nil,
			"no digest":   {{InstanceName: "in", DigestFunction: sha, ChunkDigests: chunks}},
			"no function": {{InstanceName: "in", BlobDigest: whole.Proto(), ChunkDigests: chunks}},
			"digest later": {
				{InstanceName: "in", DigestFunction: sha}, {BlobDigest: whole.Proto(), ChunkDigests: chunks},
			},
			"function later": {
				{InstanceName: "in", BlobDigest: whole.Proto()}, {DigestFunction: sha, ChunkDigests: chunks},
			},
			"instance later": {
				{BlobDigest: whole.Proto(), DigestFunction: sha}, {InstanceName: "in", ChunkDigests: chunks},
			},
		} {
			_, err := h.registerMessages(t.Context(), messages...)
			wantCode(t, what, err, codes.InvalidArgument)
		}
		if !h.missing(t, whole) {
			t.Error("the blob is there")
		}
	})
	t.Run("CHK-16 cancelled before the half-close", func(t *testing.T) {
		a, b, whole := upload()
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := h.cas.RegisterChunkMapping(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&repb.RegisterChunkMappingRequest{InstanceName: "in", BlobDigest: whole.Proto(), DigestFunction: sha, ChunkDigests: []*repb.Digest{a, b}}); err != nil {
			t.Fatal(err)
		}
		cancel()
		_, err = stream.CloseAndRecv()
		wantCode(t, "CloseAndRecv", err, codes.Canceled)
		eventually(t, "the call ends", func() bool { return handlers() == 0 })
		if !h.missing(t, whole) {
			t.Error("the blob is there")
		}
	})
}

// Rows for streams of chunks: neither silence nor empty messages hold a call.
func TestRegisterChunkMappingStalls(t *testing.T) {
	h := start(t, withChunks(smallChunks), func(c *frontend.Config) {
		c.Limits.Stall, c.Limits.NoData = 300*time.Millisecond, 200*time.Millisecond
	})
	first := &repb.RegisterChunkMappingRequest{BlobDigest: absent().Proto(), DigestFunction: repb.DigestFunction_SHA256}
	t.Run("X-29 silence", func(t *testing.T) {
		stream, err := h.cas.RegisterChunkMapping(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(first); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "RecvMsg", stream.RecvMsg(&repb.RegisterChunkMappingResponse{}), codes.DeadlineExceeded)
	})
	t.Run("X-32 empty messages", func(t *testing.T) {
		stream, err := h.cas.RegisterChunkMapping(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		empty := &repb.RegisterChunkMappingRequest{}
		for m := first; stream.Send(m) == nil; m = empty {
		}
		wantCode(t, "RecvMsg", stream.RecvMsg(&repb.RegisterChunkMappingResponse{}), codes.DeadlineExceeded, "empty")
	})
}

// A chunk that is damaged, or for which there is no room, is not the client's fault.
func TestSpliceFailures(t *testing.T) {
	memory := castest.NewMemory()
	faulty := &castest.Faulty{Store: memory, Plan: func(op castest.Op, d digest.Digest) castest.Fault {
		if op == castest.OpPut && d.Size() == 3000 {
			return castest.Fault{After: 2500, Err: cas.ErrFull}
		}
		return castest.Fault{}
	}}
	h := start(t, withChunks(smallChunks), func(c *frontend.Config) { c.Blobs = faulty })
	a, b := random(1000), random(2000)
	da, db, whole := h.put(t, a), h.put(t, b), space.Of(bytes.Join([][]byte{a, b}, nil))
	t.Run("CHK-12 no room", func(t *testing.T) {
		wantCode(t, "SpliceBlob", h.splice(t.Context(), whole, da.Proto(), db.Proto()), codes.ResourceExhausted)
	})
	t.Run("RD-13 a damaged chunk", func(t *testing.T) {
		memory.Corrupt(da, random(1000))
		wantCode(t, "SpliceBlob", h.splice(t.Context(), whole, da.Proto(), db.Proto()), codes.DataLoss)
	})
}

// Digests at the edges of what is well formed, of every function, never make a call fail as if the farm had
// an error.
func TestSpliceOfOddDigests(t *testing.T) {
	h := start(t, withChunks(smallChunks))
	for _, fn := range digest.Functions() {
		space := must(digest.SpaceOf("", fn.Proto(), ""))
		empty, some := space.Of(nil), space.Of(random(10))
		odd := []*repb.Digest{
			empty.Proto(), some.Proto(),
			{Hash: some.Hash()},
			{Hash: empty.Hash(), SizeBytes: 10},
			{Hash: some.Hash(), SizeBytes: 1},
			{Hash: some.Hash(), SizeBytes: math.MaxInt64},
			{Hash: strings.Repeat("0", len(some.Hash())), SizeBytes: 10},
			{Hash: strings.Repeat("f", len(some.Hash())), SizeBytes: 10},
			{Hash: some.Hash()[1:], SizeBytes: 10},
			{Hash: strings.ToUpper(some.Hash()), SizeBytes: 10},
		}
		for _, blob := range odd {
			for _, chunk := range odd {
				_, err := h.cas.SpliceBlob(t.Context(), &repb.SpliceBlobRequest{DigestFunction: fn.Proto(), BlobDigest: blob, ChunkDigests: []*repb.Digest{chunk, chunk}})
				if code := status.Code(err); code == codes.Internal || code == codes.Unknown {
					t.Errorf("%v: %v of %v: %v", fn, blob, chunk, err)
				}
			}
		}
	}
}
