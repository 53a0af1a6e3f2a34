package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Put implements cas.Store. An upload that breaks off leaves nothing to go on from; it is begun anew.
// An upstream that has the blob ends the upload early, which is success.
func (c *Client) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case d.IsEmpty():
		return nil
	case d.IsImpossible():
		return fmt.Errorf("%w: no blob can have the digest %v", cas.ErrMismatch, d)
	}
	can, err := c.canStore(d)
	if err != nil {
		return err
	}
	verified := cas.Verify(r, d)
	if d.Size() > min(smallBlob, can.batch) {
		return c.upload(ctx, d, verified, can)
	}
	data, err := io.ReadAll(verified)
	if err != nil {
		return err
	}
	errs, err := c.putBatch(ctx, []blob{{d, data}})
	if err != nil {
		return fmt.Errorf("storing %v: %w", d, err)
	}
	return errs[0]
}

// canStore is can for a blob that is to be stored.
func (c *Client) canStore(d digest.Digest) (*abilities, error) {
	can, err := c.can(d)
	switch {
	case err != nil:
		return nil, err
	case c.noBlobs.Load():
		return nil, fmt.Errorf("%w: it takes no blobs", ErrRefused)
	case d.Size() > can.blob:
		return nil, fmt.Errorf("%w: it takes blobs of at most %d bytes", ErrRefused, can.blob)
	}
	return can, nil
}

// blob is a small blob in memory.
type blob struct {
	digest digest.Digest
	data   []byte
}

// putBatch stores blobs of one space that together are not larger than a batch. There is one error
// for each; its own error is one of the call. The bytes must have been verified.
func (c *Client) putBatch(ctx context.Context, blobs []blob) ([]error, error) {
	space := blobs[0].digest.Space()
	there, err := c.spaceThere(space)
	if err != nil {
		return nil, err
	}
	can, err := c.health.able()
	if err != nil {
		return nil, err
	}
	request := &repb.BatchUpdateBlobsRequest{
		InstanceName: there.Instance(), DigestFunction: space.Function().Proto(),
		Requests: make([]*repb.BatchUpdateBlobsRequest_Request, len(blobs)),
	}
	sent := 0
	for i, b := range blobs {
		data, compressor := shrink(b.data, can.zstdBatch)
		request.Requests[i] = &repb.BatchUpdateBlobsRequest_Request{Digest: b.digest.Proto(), Data: data, Compressor: compressor}
		sent += len(data)
	}
	var answer *repb.BatchUpdateBlobsResponse
	err = c.call(ctx, "BatchUpdateBlobs", func(ctx context.Context) (err error) {
		answer, err = c.blobs.BatchUpdateBlobs(ctx, request)
		return err
	})
	if err != nil {
		return nil, c.forbidden(ctx, &c.noBlobs, "blobs", onPut(err))
	}
	c.metrics.sent.Add(float64(sent))
	codeOf := make(map[string]error, len(blobs))
	for _, r := range answer.GetResponses() {
		codeOf[r.GetDigest().GetHash()] = onPut(ofStatus(codes.Code(r.GetStatus().GetCode()), r.GetStatus().GetMessage())) //nolint:gosec // a code is a small number
	}
	errs := make([]error, len(blobs))
	for i, b := range blobs {
		err, answered := codeOf[b.digest.Hash()]
		if !answered {
			err = fmt.Errorf("%w: the upstream cache did not answer for %v", cas.ErrUnavailable, b.digest)
		}
		errs[i] = err
	}
	return errs, nil
}

// shrink returns data in the form in which it travels.
func shrink(data []byte, zstd bool) ([]byte, repb.Compressor_Value) {
	const least = 256 // below it nothing is gained
	if !zstd || len(data) < least {
		return data, repb.Compressor_IDENTITY
	}
	if shrunk := compress.Append(nil, data); len(shrunk) < len(data)-len(data)/8 {
		return shrunk, repb.Compressor_ZSTD
	}
	return data, repb.Compressor_IDENTITY
}

// onPut turns errors that mean something else when a blob is stored.
func onPut(err error) error {
	if errors.Is(err, cas.ErrNotFound) || errors.Is(err, cas.ErrMismatch) {
		return fmt.Errorf("%w: %v", ErrRefused, err) //nolint:errorlint // the bytes were verified here
	}
	return err
}

// forbidden remembers that the upstream forbids what err is about, and says so once.
func (c *Client) forbidden(ctx context.Context, flag interface{ Swap(flag bool) bool }, what string, err error) error {
	if errors.Is(err, errForbidden) && !flag.Swap(true) {
		c.cfg.Log.WarnContext(ctx, "upstream cache forbids writes; no more are tried", "what", what, "address", c.cfg.Endpoint.Address, "err", err)
	}
	return err
}

// upload streams a blob. An error of r is returned as it is.
func (c *Client) upload(ctx context.Context, d digest.Digest, r io.Reader, can *abilities) error {
	there, err := c.there(d)
	if err != nil {
		return err
	}
	bound, dog, cancel := watch(c.outgoing(ctx), c.cfg.Stall)
	defer cancel(errClosed)
	buffer, ok := messages.Get().(*[]byte)
	if !ok {
		fresh := make([]byte, messageBytes)
		buffer = &fresh
	}
	defer messages.Put(buffer)
	out := &outgoing{buffer: (*buffer)[:0], sent: c.metrics.sent.Add}
	name := digest.Write{Digest: there, Upload: uuid.NewString(), Compressor: can.compressor()}.String()
	err = dog.wait(func() (err error) {
		out.stream, err = c.bytes.Write(bound)
		return err
	})
	out.wait, out.name = dog.wait, name
	if err == nil {
		if err := encode(out, r, can.zstd); err != nil {
			c.count("Write", context.Canceled)
			return err
		}
		err = out.err
	}
	committed := int64(0)
	if err == nil || errors.Is(err, io.EOF) {
		// io.EOF is an upstream that ended the stream; the answer says why.
		err = dog.wait(func() error {
			answer, err := out.stream.CloseAndRecv()
			committed = answer.GetCommittedSize()
			return err
		})
	}
	c.count("Write", err)
	if err != nil {
		err = c.forbidden(ctx, &c.noBlobs, "blobs", onPut(c.done(ctx, dog.begun, failure(ctx, bound, err))))
		return fmt.Errorf("storing %v: %w", d, err)
	}
	_ = c.done(ctx, dog.begun, nil) //nolint:errcheck // it returns what it gets
	// Servers differ in how they count a compressed upload that came to its end.
	if committed == d.Size() || committed == -1 || (out.finished && committed == out.offset) {
		return nil
	}
	return fmt.Errorf("%w: the upstream cache says that it has stored %d bytes of %v", cas.ErrUnavailable, committed, d)
}

// encode writes all of r to out and finishes that, unless out fails, which out.err tells. Its error is
// that of r as it is.
func encode(out *outgoing, r io.Reader, zstd bool) error {
	buffer, ok := copies.Get().(*[]byte)
	if !ok {
		fresh := make([]byte, copyBytes)
		buffer = &fresh
	}
	defer copies.Put(buffer)
	if !zstd {
		if _, err := io.CopyBuffer(struct{ io.Writer }{out}, r, *buffer); out.err == nil && err != nil {
			return err
		}
		out.finish()
		return nil
	}
	encoder := compress.NewWriter(out)
	_, err := io.CopyBuffer(struct{ io.Writer }{encoder}, r, *buffer)
	failed := out.err == nil && err != nil // it was r
	// Closing gives the encoder back, whatever happened, and writes the end of the frame: an error of
	// that is an error of the transfer (audit row 1).
	end := encoder.Close()
	switch {
	case failed:
		return err
	case end != nil && out.err == nil:
		out.err = end
	}
	out.finish()
	return nil
}

const (
	// messageBytes is the data of one message of an upload.
	messageBytes = 256 << 10
	copyBytes    = 64 << 10
)

var (
	messages sync.Pool //nolint:gochecknoglobals // of *[]byte with room for messageBytes
	copies   sync.Pool //nolint:gochecknoglobals // of *[]byte of copyBytes
)

// outgoing cuts what is written into messages. The last one is held back until finish, so that an
// upload whose source fails never looks complete.
type outgoing struct {
	stream   bytestream.ByteStream_WriteClient
	wait     func(func() error) error
	sent     func(float64)
	name     string
	offset   int64 // bytes sent
	buffer   []byte
	finished bool
	err      error // sticky; io.EOF when the upstream has ended the stream
}

// Write implements io.Writer.
func (w *outgoing) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		if len(w.buffer) == messageBytes {
			if err := w.send(false); err != nil {
				return written, err
			}
		}
		n := min(len(p), messageBytes-len(w.buffer))
		w.buffer = append(w.buffer, p[:n]...)
		p = p[n:]
		written += n
	}
	return written, nil
}

// finish sends what is left, and that it is the last, unless an error came before.
func (w *outgoing) finish() { _ = w.send(true) } //nolint:errcheck // w.err has it

func (w *outgoing) send(last bool) error {
	if w.err != nil {
		return w.err
	}
	m := &bytestream.WriteRequest{WriteOffset: w.offset, Data: w.buffer, FinishWrite: last}
	if w.offset == 0 {
		m.ResourceName = w.name
	}
	if w.err = w.wait(func() error { return w.stream.Send(m) }); w.err != nil {
		return w.err
	}
	w.sent(float64(len(w.buffer)))
	w.offset += int64(len(w.buffer))
	w.buffer = w.buffer[:0] // gRPC has encoded it
	w.finished = last
	return nil
}
