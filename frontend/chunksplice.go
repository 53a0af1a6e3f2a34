package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// SpliceBlob stores the blob whose chunks are given, if they make up that blob (rows CHK-9 to CHK-12).
func (c *content) SpliceBlob(ctx context.Context, req *repb.SpliceBlobRequest) (*repb.SpliceBlobResponse, error) {
	if c.chunks == nil {
		return nil, errNoChunks()
	}
	s, err := c.chunks.begin(req.GetInstanceName(), req.GetDigestFunction(), req.GetBlobDigest())
	if err == nil {
		err = s.add(req.GetChunkDigests())
	}
	if err == nil {
		err = c.chunks.splice(ctx, s)
	}
	if err != nil {
		return nil, err
	}
	return &repb.SpliceBlobResponse{BlobDigest: s.blob.Proto()}, nil
}

// RegisterChunkMapping is SpliceBlob with a list of any length. The first message says which blob it is,
// whatever later ones say; the client's half-close asks for it (rows CHK-13 to CHK-16).
func (c *content) RegisterChunkMapping(stream grpc.ClientStreamingServer[repb.RegisterChunkMappingRequest, repb.RegisterChunkMappingResponse]) error {
	if c.chunks == nil {
		return errNoChunks()
	}
	m, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: the stream ended without a message", errInvalid)
	}
	if err != nil {
		return err
	}
	if m.GetDigestFunction() == repb.DigestFunction_UNKNOWN {
		return fmt.Errorf("%w: digest_function is not set in the first message", errInvalid)
	}
	s, err := c.chunks.begin(m.GetInstanceName(), m.GetDigestFunction(), m.GetBlobDigest())
	if err != nil {
		return err
	}
	idleSince := time.Now()
	for !errors.Is(err, io.EOF) {
		if len(m.GetChunkDigests()) > 0 {
			idleSince = time.Now()
		} else if idle := time.Since(idleSince); idle > c.limits.NoData {
			return fmt.Errorf("%w: only empty messages for %v", errStalled, idle.Round(time.Second))
		}
		if err := s.add(m.GetChunkDigests()); err != nil {
			return err
		}
		if m, err = stream.Recv(); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	if err := c.chunks.splice(stream.Context(), s); err != nil {
		return err
	}
	return stream.SendAndClose(&repb.RegisterChunkMappingResponse{BlobDigest: s.blob.Proto()})
}

// spliced is a blob and the chunks that a client says it has.
type spliced struct {
	blob   digest.Digest
	chunks digestList
	most   int
}

// begin checks the blob of a request.
func (c *chunker) begin(instance string, function repb.DigestFunction_Value, blob *repb.Digest) (*spliced, error) {
	space, err := spaceOf(instance, function, blob)
	if err != nil {
		return nil, err
	}
	d, err := space.Parse(blob)
	if err != nil {
		return nil, fmt.Errorf("blob_digest: %w", err)
	}
	if d.Size() > c.limits.MaxBlobBytes {
		return nil, fmt.Errorf("%w: blob %v is larger than %d bytes, the most that is stored", errInvalid, d, c.limits.MaxBlobBytes)
	}
	if d.IsImpossible() {
		return nil, fmt.Errorf("%w: no blob can have the digest %v", errInvalid, d)
	}
	return &spliced{blob: d, chunks: digestList{space: space}, most: c.limits.MaxChunks}, nil
}

// add takes more chunks. Too many, and more bytes than the blob has, end it at once (row CHK-21).
func (s *spliced) add(chunks []*repb.Digest) error {
	if s.chunks.len()+len(chunks) > s.most {
		return fmt.Errorf("%w: %v has more than %d chunks", errTooLarge, s.blob, s.most)
	}
	for _, m := range chunks {
		d, err := s.chunks.space.Parse(m)
		if err != nil {
			return fmt.Errorf("chunk_digests[%d]: %w", s.chunks.len(), err)
		}
		if d.Size() > s.blob.Size()-s.chunks.total {
			return fmt.Errorf("%w: the first %d chunks have more than the %d bytes of %v", errInvalid, s.chunks.len()+1, s.blob.Size(), s.blob)
		}
		s.chunks.add(d)
	}
	return nil
}

// splice stores the blob unless it is there (row CHK-11). No chunk is read unless all are there.
func (c *chunker) splice(ctx context.Context, s *spliced) error {
	if s.chunks.total != s.blob.Size() {
		return fmt.Errorf("%w: the chunks have %d bytes, %v has %d", errInvalid, s.chunks.total, s.blob, s.blob.Size())
	}
	missing, err := c.blobs.Missing(ctx, []digest.Digest{s.blob})
	if err != nil || len(missing) == 0 {
		return err
	}
	err = s.chunks.pages(mappingPage, func(ds []digest.Digest) error {
		missing, err := cas.Confirm(ctx, c.blobs, ds)
		if err == nil && len(missing) > 0 {
			err = fmt.Errorf("%w: %d of the chunks, the first is %v", cas.ErrNotFound, len(missing), missing[0])
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := c.slots.Acquire(ctx, 1); err != nil {
		return context.Cause(ctx)
	}
	defer c.slots.Release(1)
	r := &chunkReader{chunks: &s.chunks, open: func(d digest.Digest) (io.ReadCloser, error) { return c.blobs.Open(ctx, d, 0) }}
	err = c.blobs.Put(ctx, s.blob, r)
	return errors.Join(err, r.Close())
}

// chunkReader reads chunks one after the other. A chunk that is damaged is errDamaged: the client's list
// may be right.
type chunkReader struct {
	chunks  *digestList
	open    func(digest.Digest) (io.ReadCloser, error)
	next    int
	current io.ReadCloser
	err     error
}

// Read implements io.Reader.
func (r *chunkReader) Read(p []byte) (int, error) {
	for r.err == nil {
		if r.current == nil {
			r.err = r.advance()
			continue
		}
		n, err := r.current.Read(p)
		if errors.Is(err, io.EOF) {
			err = r.Close()
		}
		if err != nil {
			r.err = onRead(err)
		}
		if n > 0 || len(p) == 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// advance opens the next chunk.
func (r *chunkReader) advance() error {
	if r.next == r.chunks.len() {
		return io.EOF
	}
	d := r.chunks.slice(r.next, r.next+1)[0]
	r.next++
	current, err := r.open(d)
	if err != nil {
		return onRead(err)
	}
	r.current = current
	return nil
}

// Close closes the chunk that is open.
func (r *chunkReader) Close() error {
	if r.current == nil {
		return nil
	}
	current := r.current
	r.current = nil
	return current.Close()
}
