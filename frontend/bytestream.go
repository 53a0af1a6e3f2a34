package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// byteStream serves google.bytestream.ByteStream: reading blobs here, logs in logs.go, uploads in write.go.
type byteStream struct {
	bytestream.UnimplementedByteStreamServer
	blobs   cas.Store
	limits  Limits
	metrics *metrics
	chunks  *chunkPool

	uploads, decoders slots
	logs              *logs
}

func newByteStream(blobs cas.Store, limits Limits, metrics *metrics) *byteStream {
	return &byteStream{
		blobs: blobs, limits: limits, metrics: metrics, chunks: &chunkPool{size: limits.ReadChunkBytes},
		uploads:  slots{what: "uploads", most: int64(limits.MaxUploads)},
		decoders: slots{what: "compressed uploads", most: int64(limits.MaxCompressedUploads)},
	}
}

// Read streams a blob from an offset on. An absent blob is NOT_FOUND before any data (row RD-2); a
// damaged one is DATA_LOSS in place of the end (row RD-13).
func (b *byteStream) Read(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	ctx := stream.Context()
	if err := checkResourceHeader(ctx, req.GetResourceName()); err != nil {
		return err
	}
	if name, ours, err := parseLog(req.GetResourceName()); ours {
		if err != nil {
			return err
		}
		return b.logs.read(name, req, b, stream)
	}
	name, err := digest.ParseRead(req.GetResourceName())
	if err != nil {
		return err
	}
	d, offset, limit := name.Digest, req.GetReadOffset(), req.GetReadLimit()
	if offset < 0 || offset > d.Size() {
		return fmt.Errorf("%w: read_offset %d of a blob of %d bytes", errRange, offset, d.Size())
	}
	if name.Compressor == digest.Zstd {
		if limit != 0 {
			return fmt.Errorf("%w: read_limit %d of a compressed read, which has none", errInvalid, limit)
		}
		return b.readFrames(ctx, d, offset, stream)
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
	return b.send(&download{stream: stream, chunks: b.chunks, left: limit, whole: limit == d.Size()-offset}, r)
}

// readFrames is Read of a blob as zstd: frames that decompress to its bytes from offset on.
func (b *byteStream) readFrames(ctx context.Context, d digest.Digest, offset int64, stream grpc.ServerStream) error {
	r, err := cas.OpenFrames(ctx, b.blobs, d, offset)
	if err != nil {
		return onRead(err)
	}
	return b.send(&download{stream: stream, chunks: b.chunks, left: math.MaxInt64, whole: true}, r)
}

// send sends what is in r and closes it.
func (b *byteStream) send(sink *download, r io.ReadCloser) error {
	err := sink.from(r)
	b.metrics.sent.WithLabelValues("bytestream").Add(float64(sink.sent))
	r.Close() //nolint:errcheck // the blob has been sent, or the call has failed already
	if errors.Is(err, errEnough) {
		return nil
	}
	return onRead(err)
}

// errEnough ends a copy after read_limit bytes.
var errEnough = errors.New("read limit reached")

// download sends at most left bytes to the client of a Read.
type download struct {
	stream grpc.ServerStream
	chunks *chunkPool
	left   int64
	whole  bool // left is all that the reader has: its end, and the verdict on it, must be seen
	sent   int64
}

// from sends the bytes of r. A reader that has its data in memory writes it itself; any other one reads
// into the buffers that are sent.
func (w *download) from(r io.Reader) error {
	if from, ok := r.(io.WriterTo); ok {
		_, err := from.WriteTo(w)
		return err
	}
	for {
		if w.enough() {
			return errEnough
		}
		b := w.chunks.Get(int(min(int64(w.chunks.size), max(w.left, 1))))
		n, err := r.Read(*b)
		if int64(n) > w.left {
			err = errLonger
			n = 0
		}
		if n > 0 {
			if bad := w.send(w.chunks.cut(b, n)); bad != nil {
				return bad
			}
		} else {
			w.chunks.Put(b)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// errLonger reports a reader with more bytes than the blob has.
var errLonger = fmt.Errorf("%w: it is longer than its digest says", cas.ErrMismatch)

// Write implements io.Writer. It keeps nothing of p.
func (w *download) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		if w.left == 0 {
			return written, errEnough
		}
		n := int(min(int64(len(p)-written), int64(w.chunks.size), w.left))
		if err := w.send(w.chunks.copyOf(p[written : written+n])); err != nil {
			return written, err
		}
		written += n
	}
	if w.enough() {
		return written, errEnough
	}
	return written, nil
}

func (w *download) enough() bool { return w.left == 0 && !w.whole }

// send gives a buffer to the transport.
func (w *download) send(data mem.Buffer) error {
	n := int64(data.Len())
	if err := w.stream.SendMsg(&readResponse{data: data}); err != nil {
		return err
	}
	w.left -= n
	w.sent += n
	return nil
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
