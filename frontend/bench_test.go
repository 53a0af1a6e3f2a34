package frontend_test

import (
	"fmt"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/jetfarm/jetfarm/cas/chunking"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Each benchmark talks to a frontend over loopback gRPC, with the store in JetStream on files.

func BenchmarkFindMissingBlobs(b *testing.B) {
	h := start(b)
	for _, present := range []bool{false, true} {
		for _, n := range []int{1000, 10_000} {
			b.Run(fmt.Sprintf("present=%v/digests=%d", present, n), func(b *testing.B) {
				req := &repb.FindMissingBlobsRequest{BlobDigests: make([]*repb.Digest, n)}
				for i := range req.GetBlobDigests() {
					d := space.Of(fmt.Appendf(nil, "%v %d", present, i))
					if present {
						d = h.put(b, fmt.Appendf(nil, "%v %d", present, i))
					}
					req.BlobDigests[i] = d.Proto()
				}
				b.ReportAllocs()
				for b.Loop() {
					if _, err := h.cas.FindMissingBlobs(b.Context(), req); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkBatchUpdateBlobs(b *testing.B) {
	h := start(b)
	b.SetBytes(1000 << 10)
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		req := &repb.BatchUpdateBlobsRequest{}
		for range 1000 {
			req.Requests = append(req.Requests, blob(random(1<<10)))
		}
		b.StartTimer()
		if _, err := h.cas.BatchUpdateBlobs(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBatchReadBlobs(b *testing.B) {
	h := start(b)
	req := &repb.BatchReadBlobsRequest{}
	for range 1000 {
		req.Digests = append(req.Digests, h.put(b, random(1<<10)).Proto())
	}
	b.SetBytes(1000 << 10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.cas.BatchReadBlobs(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkByteStreamWrite(b *testing.B) {
	for _, bench := range []struct {
		name        string
		size, chunk int
	}{
		{"size=1KiB", 1 << 10, 16 << 10},
		{"size=64MiB/message=1MiB", 64 << 20, 1 << 20},
		{"size=64MiB/message=16KiB", 64 << 20, 16 << 10}, // as Bazel sends it
	} {
		b.Run(bench.name, func(b *testing.B) {
			h := start(b)
			b.SetBytes(int64(bench.size))
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				data := random(bench.size)
				messages := chunks(uploadName(space.Of(data)), data, bench.chunk)
				b.StartTimer()
				if _, err := h.write(b.Context(), messages...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkByteStreamRead(b *testing.B) {
	for _, size := range []int{1 << 10, 64 << 20} {
		b.Run(fmt.Sprintf("size=%dKiB", size>>10), func(b *testing.B) {
			h := start(b)
			req := &bytestream.ReadRequest{ResourceName: h.put(b, random(size)).String()}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				stream, err := h.bytes.Read(b.Context(), req)
				if err != nil {
					b.Fatal(err)
				}
				n := 0
				for err == nil {
					var m *bytestream.ReadResponse
					m, err = stream.Recv()
					n += len(m.GetData())
				}
				if n != size {
					b.Fatalf("%d bytes, %v", n, err)
				}
			}
		})
	}
}

// A cache hit: the shortest Execute that there is.
func BenchmarkExecuteCached(b *testing.B) {
	h := start(b)
	action := absent()
	if err := h.actions.Put(b.Context(), action, &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"}}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		finish(b, h.execute(b.Context(), b, &repb.ExecuteRequest{ActionDigest: action.Proto()}), action)
	}
}

// An Execute whose job is settled by the benchmark itself: all of the farm but the worker.
func BenchmarkExecute(b *testing.B) {
	h := start(b)
	q := h.queue(b)
	response := &repb.ExecuteResponse{Result: &repb.ActionResult{}, Status: &statuspb.Status{}}
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		action := h.action(b)
		b.StartTimer()
		stream := h.execute(b.Context(), b, &repb.ExecuteRequest{ActionDigest: action.Proto()})
		settle(b, begin(b, q), response)
		finish(b, stream, action)
	}
}

// BenchmarkChunks splits a blob for the first time, again, and puts it together.
func BenchmarkChunks(b *testing.B) {
	h := start(b, withChunks(chunking.Params{Average: 512 << 10}))
	const size = 64 << 20
	ask := func(d digest.Digest) []*repb.Digest {
		resp, err := h.cas.SplitBlob(b.Context(), &repb.SplitBlobRequest{BlobDigest: d.Proto()})
		if err != nil {
			b.Fatal(err)
		}
		return resp.GetChunkDigests()
	}
	b.Run("split", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			b.StopTimer()
			d := h.put(b, random(size))
			b.StartTimer()
			ask(d)
		}
	})
	b.Run("split again", func(b *testing.B) {
		d := h.put(b, random(size))
		ask(d)
		b.SetBytes(size)
		for b.Loop() {
			ask(d)
		}
	})
	b.Run("splice", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			b.StopTimer()
			head, tail := random(size-1000), random(1000)
			chunks := []*repb.Digest{h.put(b, tail).Proto()}
			chunks = append(chunks, ask(h.put(b, head))...)
			whole := space.Of(append(tail, head...))
			b.StartTimer()
			if err := h.splice(b.Context(), whole, chunks...); err != nil {
				b.Fatal(err)
			}
		}
	})
}
