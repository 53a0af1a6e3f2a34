package frontend

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// SplitBlob answers which chunks a blob has, all of which are stored then (rows CHK-2 to CHK-8). A list
// that is too long for one message is RESOURCE_EXHAUSTED; GetChunkMapping has no such limit.
func (c *content) SplitBlob(ctx context.Context, req *repb.SplitBlobRequest) (*repb.SplitBlobResponse, error) {
	if c.chunks == nil {
		return nil, errNoChunks()
	}
	space, err := spaceOf(req.GetInstanceName(), req.GetDigestFunction(), req.GetBlobDigest())
	if err != nil {
		return nil, err
	}
	d, err := space.Parse(req.GetBlobDigest())
	if err != nil {
		return nil, fmt.Errorf("blob_digest: %w", err)
	}
	response := &repb.SplitBlobResponse{ChunkingFunction: cutWith}
	most := c.limits.room(space.Function())
	return response, c.chunks.split(ctx, d, func(ds []digest.Digest) error {
		if len(response.GetChunkDigests())+len(ds) > most {
			return fmt.Errorf("%w: %v has more than %d chunks; GetChunkMapping can list them", errTooLarge, d, most)
		}
		response.ChunkDigests = append(response.GetChunkDigests(), digestProtos(ds)...)
		return nil
	})
}

// mappingPage is how many digests one message of GetChunkMapping has: at most 600 KB.
const mappingPage = 4096

// GetChunkMapping is SplitBlob with a list of any length. It is sent as chunks are found; only the end
// of the stream says that it is right.
func (c *content) GetChunkMapping(req *repb.GetChunkMappingRequest, stream grpc.ServerStreamingServer[repb.GetChunkMappingResponse]) error {
	if c.chunks == nil {
		return errNoChunks()
	}
	if req.GetDigestFunction() == repb.DigestFunction_UNKNOWN {
		return fmt.Errorf("%w: digest_function is not set", errInvalid)
	}
	space, err := spaceOf(req.GetInstanceName(), req.GetDigestFunction(), req.GetBlobDigest())
	if err != nil {
		return err
	}
	d, err := space.Parse(req.GetBlobDigest())
	if err != nil {
		return fmt.Errorf("blob_digest: %w", err)
	}
	page := &repb.GetChunkMappingResponse{ChunkingFunction: cutWith}
	sent := false
	send := func() error {
		err := stream.Send(page)
		page, sent = &repb.GetChunkMappingResponse{}, true
		return err
	}
	err = c.chunks.split(stream.Context(), d, func(ds []digest.Digest) error {
		page.ChunkDigests = append(page.GetChunkDigests(), digestProtos(ds)...)
		if len(page.GetChunkDigests()) < mappingPage {
			return nil
		}
		return send()
	})
	if err != nil {
		return err
	}
	if len(page.GetChunkDigests()) > 0 || !sent {
		return send()
	}
	return nil
}

func digestProtos(ds []digest.Digest) []*repb.Digest {
	out := make([]*repb.Digest, len(ds))
	for i, d := range ds {
		out[i] = d.Proto()
	}
	return out
}

// chunkBatch bounds the chunks, and chunkBatchBytes the bytes, that are stored together. A larger chunk
// is stored alone.
const (
	chunkBatch      = 64
	chunkBatchBytes = 8 << 20
)

// split calls emit with the chunks of a blob in order, a few at a time, when they are stored. Blob and
// chunks stay for the retention window then (row CHK-19).
func (c *chunker) split(ctx context.Context, d digest.Digest, emit func([]digest.Digest) error) error {
	if chunks := c.known.get(d); chunks != nil {
		whole, err := c.have(ctx, d, chunks)
		if err != nil {
			return err
		}
		if whole {
			return chunks.pages(chunkBatch, emit)
		}
	}
	if err := c.slots.Acquire(ctx, 1); err != nil {
		return context.Cause(ctx)
	}
	defer c.slots.Release(1)
	if err := c.touch(ctx, d); err != nil {
		return err
	}
	r, err := c.blobs.Open(ctx, d, 0)
	if err != nil {
		return onRead(err)
	}
	defer r.Close() //nolint:errcheck // its end was seen, or the call fails anyway
	batch := &chunkStore{chunker: c, blob: d, emit: emit, found: digestList{space: d.Space()}}
	err = c.cutter.Split(r, d.Size(), func(chunk []byte) error { return batch.add(ctx, chunk) })
	if err != nil {
		return onRead(err)
	}
	if err := batch.flush(ctx); err != nil {
		return err
	}
	c.known.put(d, &batch.found)
	return nil
}

// touch asks for the blob as FindMissingBlobs does, which prolongs its life.
func (c *chunker) touch(ctx context.Context, d digest.Digest) error {
	missing, err := cas.Confirm(ctx, c.blobs, []digest.Digest{d})
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%w: %v", cas.ErrNotFound, d)
	}
	return err
}

// have tells whether the store has a blob's chunks, all of them. The blob itself must be there.
func (c *chunker) have(ctx context.Context, d digest.Digest, chunks *digestList) (bool, error) {
	if err := c.touch(ctx, d); err != nil {
		return false, err
	}
	whole := true
	err := chunks.pages(mappingPage, func(ds []digest.Digest) error {
		missing, err := c.blobs.Missing(ctx, ds)
		whole = whole && len(missing) == 0
		return err
	})
	return whole, err
}

// chunkStore takes the chunks of one blob and stores those that are missing.
type chunkStore struct {
	chunker *chunker
	blob    digest.Digest
	emit    func([]digest.Digest) error
	found   digestList
	waiting []digest.Digest
	offsets []int  // of the waiting chunks in data
	data    []byte // of the waiting chunks
}

// add takes a chunk, which it copies.
func (s *chunkStore) add(ctx context.Context, chunk []byte) error {
	if most := s.chunker.limits.MaxChunks; s.found.len()+len(s.waiting) >= most {
		return fmt.Errorf("%w: %v has more than %d chunks", errTooLarge, s.blob, most)
	}
	if len(s.waiting) == chunkBatch || (len(s.waiting) > 0 && len(s.data)+len(chunk) > chunkBatchBytes) {
		if err := s.flush(ctx); err != nil {
			return err
		}
	}
	s.waiting = append(s.waiting, s.blob.Space().Of(chunk))
	s.offsets = append(s.offsets, len(s.data))
	s.data = append(s.data, chunk...)
	return nil
}

// flush stores what waits and hands the digests on.
func (s *chunkStore) flush(ctx context.Context) error {
	if len(s.waiting) == 0 {
		return nil
	}
	store := s.chunker.blobs
	missing, err := store.Missing(ctx, s.waiting)
	if err != nil {
		return err
	}
	absent := make(map[digest.Digest]bool, len(missing))
	for _, d := range missing {
		absent[d] = true
	}
	data := make([][]byte, 0, len(missing))
	for i, d := range s.waiting {
		if absent[d] {
			delete(absent, d) // Once, in the order of missing.
			data = append(data, s.data[s.offsets[i]:][:d.Size()])
		}
	}
	for i, err := range cas.PutBatch(ctx, store, s.chunker.limits.BatchConcurrency, missing, data) {
		if err != nil {
			return fmt.Errorf("store the chunk %v: %w", missing[i], err)
		}
	}
	for _, d := range s.waiting {
		s.found.add(d)
	}
	err = s.emit(s.waiting)
	s.waiting, s.offsets, s.data = s.waiting[:0], s.offsets[:0], s.data[:0]
	return err
}
