package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/metadata"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// byteStream serves google.bytestream.ByteStream for blobs. Uploads are not resumable: a stream that
// ends early leaves nothing, and QueryWriteStatus knows whole blobs only.
type byteStream struct {
	bytestream.UnimplementedByteStreamServer
	blobs   cas.Store
	limits  Limits
	metrics *metrics
	buffers sync.Pool // of *[]byte
}

func newByteStream(blobs cas.Store, limits Limits, metrics *metrics) *byteStream {
	return &byteStream{blobs: blobs, limits: limits, metrics: metrics}
}

// Read streams a blob from an offset on. An absent blob is NOT_FOUND before any data (row RD-2); a
// damaged one is DATA_LOSS in place of the end (row RD-13).
func (b *byteStream) Read(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	ctx := stream.Context()
	if err := checkResourceHeader(ctx, req.GetResourceName()); err != nil {
		return err
	}
	name, err := digest.ParseRead(req.GetResourceName())
	if err != nil {
		return err
	}
	d, offset, limit := name.Digest, req.GetReadOffset(), req.GetReadLimit()
	if offset < 0 || offset > d.Size() {
		return fmt.Errorf("%w: read_offset %d of a blob of %d bytes", errRange, offset, d.Size())
	}
	if limit < 0 {
		return fmt.Errorf("%w: read_limit %d is negative", errInvalid, limit)
	}
	if limit == 0 || limit > d.Size()-offset {
		limit = d.Size() - offset
	}
	r, err := b.blobs.Open(ctx, d, offset)
	if err != nil {
		return onRead(err)
	}
	sink := &download{stream: stream, chunk: b.limits.ReadChunkBytes, left: limit, whole: limit == d.Size()-offset}
	err = b.copy(sink, r)
	b.metrics.sent.WithLabelValues("bytestream").Add(float64(limit - sink.left))
	r.Close() //nolint:errcheck // the blob has been sent, or the call has failed already
	if errors.Is(err, errEnough) {
		return nil
	}
	return onRead(err)
}

// copy lets the reader write its own chunks when it can, and lends it a buffer when it cannot.
func (b *byteStream) copy(w io.Writer, r io.Reader) error {
	if from, ok := r.(io.WriterTo); ok {
		_, err := from.WriteTo(w)
		return err
	}
	buf, ok := b.buffers.Get().(*[]byte)
	if !ok {
		fresh := make([]byte, min(b.limits.ReadChunkBytes, 256<<10))
		buf = &fresh
	}
	defer b.buffers.Put(buf)
	_, err := io.CopyBuffer(w, struct{ io.Reader }{r}, *buf)
	return err
}

// errEnough ends a copy after read_limit bytes.
var errEnough = errors.New("read limit reached")

// download is the client of a Read as an io.Writer of at most left bytes. gRPC has encoded the data
// when Send returns, so Write keeps nothing of p.
type download struct {
	stream bytestream.ByteStream_ReadServer
	chunk  int
	left   int64
	whole  bool // left is all that the reader has: its end, and the verdict on it, must be seen
}

func (w *download) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		if w.left == 0 {
			return written, errEnough
		}
		n := min(len(p), w.chunk, int(min(w.left, int64(w.chunk))))
		if err := w.stream.Send(&bytestream.ReadResponse{Data: p[:n]}); err != nil {
			return written, err
		}
		p = p[n:]
		written += n
		w.left -= int64(n)
	}
	if w.left == 0 && !w.whole {
		return written, errEnough
	}
	return written, nil
}

// Write stores a blob. The response comes at once when the blob is already there (rows WR-17, WR-18),
// else after finish_write and the whole blob being durable.
func (b *byteStream) Write(stream bytestream.ByteStream_WriteServer) error {
	ctx := stream.Context()
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: the stream ended without a message", errInvalid)
	}
	if err != nil {
		return err
	}
	d, err := b.target(ctx, first)
	if err != nil {
		return err
	}
	committed := d.Size()
	up, err := b.begin(ctx, d, first, stream)
	if err == nil {
		err = b.blobs.Put(ctx, d, up)
		b.metrics.received.WithLabelValues("bytestream").Add(float64(up.offset))
	}
	switch {
	case errors.Is(err, errPresent):
	case errors.Is(err, errHalfClosed):
		committed = 0
	case err != nil:
		return err
	}
	return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: committed})
}

// target returns the blob that the first message of an upload is for.
func (b *byteStream) target(ctx context.Context, first *bytestream.WriteRequest) (digest.Digest, error) {
	name := first.GetResourceName()
	if name == "" {
		return digest.Digest{}, fmt.Errorf("%w: the first message has no resource_name", errInvalid)
	}
	if err := checkResourceHeader(ctx, name); err != nil {
		return digest.Digest{}, err
	}
	w, err := digest.ParseWrite(name)
	if err != nil {
		return digest.Digest{}, err
	}
	if w.Digest.Size() > b.limits.MaxBlobBytes {
		return digest.Digest{}, fmt.Errorf("%w: blob %v is larger than %d bytes, the most that is stored", errInvalid, w.Digest, b.limits.MaxBlobBytes)
	}
	if w.Digest.IsImpossible() {
		return digest.Digest{}, fmt.Errorf("%w: no blob can have the digest %v", errInvalid, w.Digest)
	}
	return w.Digest, nil
}

// begin returns the upload that starts with first, or errPresent.
func (b *byteStream) begin(ctx context.Context, d digest.Digest, first *bytestream.WriteRequest, stream receiver) (*upload, error) {
	present := func() error {
		missing, err := b.blobs.Missing(ctx, []digest.Digest{d})
		if err == nil && len(missing) == 0 {
			return errPresent
		}
		return err
	}
	if first.GetWriteOffset() != 0 {
		// A client that resumes what this farm has no part of; there is nothing to resume unless the
		// blob has been completed in the meantime (rows WR-7, WR-17).
		if err := present(); err != nil {
			return nil, err
		}
	}
	up := &upload{
		stream: stream, name: first.GetResourceName(), size: d.Size(),
		present: present, nextLook: presentEvery, noData: b.limits.NoData,
	}
	if err := up.accept(first); err != nil {
		return nil, err
	}
	return up, nil
}

// QueryWriteStatus answers {size, true} for a blob that is present and {0, false} for any other, also
// for an upload that never was: clients take NOT_FOUND as final (row QWS-3).
func (b *byteStream) QueryWriteStatus(ctx context.Context, req *bytestream.QueryWriteStatusRequest) (*bytestream.QueryWriteStatusResponse, error) {
	if err := checkResourceHeader(ctx, req.GetResourceName()); err != nil {
		return nil, err
	}
	w, err := digest.ParseWrite(req.GetResourceName())
	if err != nil {
		return nil, err
	}
	missing, err := b.blobs.Missing(ctx, []digest.Digest{w.Digest})
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return &bytestream.QueryWriteStatusResponse{}, nil
	}
	return &bytestream.QueryWriteStatusResponse{CommittedSize: w.Digest.Size(), Complete: true}, nil
}

// resourceHeader is the header that lets proxies route ByteStream calls.
const resourceHeader = "build.bazel.remote.execution.v2.resource-name"

// checkResourceHeader refuses a call whose header names another resource (row GEN-25).
func checkResourceHeader(ctx context.Context, name string) error {
	for _, header := range metadata.ValueFromIncomingContext(ctx, resourceHeader) {
		if header != name {
			return fmt.Errorf("%w: header %s is %s, the request's resource_name is %s",
				errInvalid, resourceHeader, digest.Quote(header), digest.Quote(name))
		}
	}
	return nil
}
