package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// smallBlob is up to which size a blob travels in one message.
const smallBlob = 64 << 10

// Open implements cas.Store.
func (c *Client) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := c.open(ctx, d, offset)
	if err != nil || offset > 0 {
		return r, err
	}
	return cas.VerifyCloser(r, d), nil
}

// open is Open without the verdict on the bytes, and with that on their number.
func (c *Client) open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case d.IsEmpty():
		return io.NopCloser(bytes.NewReader(nil)), nil
	case d.IsImpossible():
		return nil, fmt.Errorf("%w: %v", cas.ErrNotFound, d)
	}
	can, err := c.can(d)
	if errors.Is(err, errFunction) {
		return nil, fmt.Errorf("%w: %v", cas.ErrNotFound, d)
	}
	if err != nil {
		return nil, err
	}
	if d.Size() <= min(smallBlob, can.batch) {
		data, err := c.readSmall(ctx, d, can)
		if err != nil {
			return nil, fmt.Errorf("reading %v: %w", d, err)
		}
		return io.NopCloser(bytes.NewReader(data[min(offset, int64(len(data))):])), nil
	}
	r, err := c.download(ctx, d, offset, can)
	if err != nil {
		return nil, fmt.Errorf("reading %v: %w", d, err)
	}
	return r, nil
}

// readSmall reads a blob in one message. Its bytes are verified.
func (c *Client) readSmall(ctx context.Context, d digest.Digest, can *abilities) ([]byte, error) {
	there, err := c.spaceThere(d.Space())
	if err != nil {
		return nil, err
	}
	request := &repb.BatchReadBlobsRequest{
		InstanceName: there.Instance(), DigestFunction: d.Space().Function().Proto(), Digests: []*repb.Digest{d.Proto()},
	}
	if can.zstd {
		request.AcceptableCompressors = []repb.Compressor_Value{repb.Compressor_ZSTD}
	}
	var answer *repb.BatchReadBlobsResponse
	err = c.call(ctx, "BatchReadBlobs", func(ctx context.Context) (err error) {
		answer, err = c.blobs.BatchReadBlobs(ctx, request)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.answerOf(d, answer)
}

// answerOf is the blob in the answer to a question for it.
func (c *Client) answerOf(d digest.Digest, answer *repb.BatchReadBlobsResponse) ([]byte, error) {
	for _, r := range answer.GetResponses() {
		if r.GetDigest().GetHash() != d.Hash() || r.GetDigest().GetSizeBytes() != d.Size() {
			continue
		}
		if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK { //nolint:gosec // a code is a small number
			return nil, ofStatus(code, r.GetStatus().GetMessage())
		}
		c.metrics.received.Add(float64(len(r.GetData())))
		data, err := expand(r.GetData(), r.GetCompressor(), d.Size())
		if err != nil {
			return nil, err
		}
		seen := cas.NewVerifier(d)
		if _, err := seen.Write(data); err != nil {
			return nil, err
		}
		return data, seen.Verdict()
	}
	return nil, fmt.Errorf("%w: the upstream cache did not answer for %v", cas.ErrUnavailable, d)
}

// errCompressor reports data in a form that was not asked for.
var errCompressor = fmt.Errorf("%w: the upstream cache sent a compressor that was not asked for", cas.ErrUnavailable)

// expand returns the data of a message in the form that is stored.
func expand(data []byte, compressor repb.Compressor_Value, size int64) ([]byte, error) {
	switch compressor {
	case repb.Compressor_IDENTITY:
		return data, nil
	case repb.Compressor_ZSTD:
		data, err := compress.Decode(nil, data, size)
		return data, damaged(err)
	case repb.Compressor_DEFLATE, repb.Compressor_BROTLI:
	}
	return nil, errCompressor
}

// damaged is cas.ErrMismatch for what is no zstd, and any other error as it is.
func damaged(err error) error {
	if errors.Is(err, compress.ErrInvalid) || errors.Is(err, compress.ErrTooLarge) {
		return fmt.Errorf("%w: %w", cas.ErrMismatch, err)
	}
	return err
}

// expanding reads what a compressed stream holds.
type expanding struct {
	*compress.Reader
	from io.Closer
}

// Read implements io.Reader.
func (r expanding) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	return n, damaged(err)
}

// Close implements io.Closer. The decoder is given back before what it reads from ends (audit D-41).
func (r expanding) Close() error { return errors.Join(r.Reader.Close(), r.from.Close()) }

// download streams a blob. The first message is here when it returns, so a blob that the upstream
// does not have is an error of the call.
func (c *Client) download(ctx context.Context, d digest.Digest, offset int64, can *abilities) (io.ReadCloser, error) {
	there, err := c.there(d)
	if err != nil {
		return nil, err
	}
	name := digest.Read{Digest: there, Compressor: can.compressor()}.String()
	bound, dog, cancel := watch(c.outgoing(ctx), c.cfg.Stall)
	var stream bytestream.ByteStream_ReadClient
	counted := false
	over := func(err error) {
		cancel(errClosed)
		if !counted {
			counted = true
			c.count("Read", err)
		}
	}
	receive := func() (data []byte, err error) {
		err = dog.wait(func() error {
			if stream == nil {
				if stream, err = c.bytes.Read(bound, &bytestream.ReadRequest{ResourceName: name, ReadOffset: offset}); err != nil {
					return err
				}
			}
			m, err := stream.Recv()
			data = m.GetData()
			return err
		})
		if errors.Is(err, io.EOF) {
			over(nil)
			_ = c.done(ctx, dog.begun, nil) //nolint:errcheck // it returns what it gets
			return nil, io.EOF
		}
		if err != nil {
			failed := failure(ctx, bound, err)
			over(err)
			return nil, c.done(ctx, dog.begun, failed)
		}
		c.metrics.received.Add(float64(len(data)))
		return data, nil
	}
	in := &incoming{receive: receive, closed: func() { over(context.Canceled) }}
	if err := in.next(); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	left := d.Size() - offset
	if can.zstd {
		return &exact{expanding{compress.NewReader(in, left), in}, d, left}, nil
	}
	return &exact{in, d, left}, nil
}

// incoming is a stream of messages as a reader.
type incoming struct {
	receive func() ([]byte, error)
	closed  func()
	data    []byte // received and not yet read
	err     error  // sticky
}

// next receives a message with data when there is none.
func (r *incoming) next() error {
	for len(r.data) == 0 && r.err == nil {
		r.data, r.err = r.receive()
	}
	if len(r.data) > 0 {
		return nil
	}
	return r.err
}

// Read implements io.Reader.
func (r *incoming) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.next(); err != nil {
		return 0, err
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// Close implements io.Closer.
func (r *incoming) Close() error {
	r.closed()
	return nil
}

// exact ends with cas.ErrMismatch unless it has brought left bytes.
type exact struct {
	io.ReadCloser
	digest digest.Digest
	left   int64
}

// Read implements io.Reader.
func (r *exact) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if r.left -= int64(n); r.left < 0 {
		return 0, fmt.Errorf("%w: the upstream cache sends more than %v has", cas.ErrMismatch, r.digest)
	}
	if errors.Is(err, io.EOF) && r.left > 0 {
		return n, fmt.Errorf("%w: the upstream cache ended %v with %d bytes missing", cas.ErrMismatch, r.digest, r.left)
	}
	return n, err
}
