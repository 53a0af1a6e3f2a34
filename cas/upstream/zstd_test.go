package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/upstream"
)

// shrinking is a cache that speaks zstd wherever the API has room for it. It counts what it gets in
// the clear.
type shrinking struct {
	script
	blobs *castest.Memory
	clear atomic.Int64
}

func newShrinking() *shrinking {
	z := &shrinking{blobs: castest.NewMemory()}
	z.capabilities = &repb.CacheCapabilities{
		SupportedCompressors:            []repb.Compressor_Value{repb.Compressor_DEFLATE, repb.Compressor_ZSTD},
		SupportedBatchUpdateCompressors: []repb.Compressor_Value{repb.Compressor_ZSTD},
	}
	for _, f := range digest.Functions() {
		z.capabilities.DigestFunctions = append(z.capabilities.DigestFunctions, f.Proto())
	}
	z.find, z.readBatch, z.update, z.read, z.write = z.findMissing, z.readAll, z.updateAll, z.send, z.receive
	return z
}

func answerTo(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, cas.ErrNotFound):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, cas.ErrMismatch):
		return status.Error(codes.InvalidArgument, err.Error())
	}
	return err
}

func (z *shrinking) findMissing(req *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	space := must(digest.SpaceOf(req.GetInstanceName(), req.GetDigestFunction(), ""))
	answer := &repb.FindMissingBlobsResponse{}
	for _, m := range req.GetBlobDigests() {
		missing, err := z.blobs.Missing(context.Background(), []digest.Digest{must(space.Parse(m))})
		if err != nil {
			return nil, err
		}
		if len(missing) > 0 {
			answer.MissingBlobDigests = append(answer.MissingBlobDigests, m)
		}
	}
	return answer, nil
}

func (z *shrinking) readAll(req *repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
	space := must(digest.SpaceOf(req.GetInstanceName(), req.GetDigestFunction(), ""))
	answer := &repb.BatchReadBlobsResponse{}
	for _, m := range req.GetDigests() {
		r := &repb.BatchReadBlobsResponse_Response{Digest: m, Compressor: repb.Compressor_ZSTD}
		data, err := cas.ReadAll(context.Background(), z.blobs, must(space.Parse(m)), m.GetSizeBytes())
		r.Status = &statuspb.Status{Code: int32(status.Code(answerTo(err)))}
		r.Data = compress.Append(nil, data)
		answer.Responses = append(answer.Responses, r)
	}
	return answer, nil
}

func (z *shrinking) updateAll(req *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	space := must(digest.SpaceOf(req.GetInstanceName(), req.GetDigestFunction(), ""))
	answer := &repb.BatchUpdateBlobsResponse{}
	for _, r := range req.GetRequests() {
		data := r.GetData()
		if r.GetCompressor() == repb.Compressor_ZSTD {
			var err error
			if data, err = compress.Decode(nil, data, r.GetDigest().GetSizeBytes()); err != nil {
				return nil, status.Error(codes.InvalidArgument, err.Error())
			}
		} else {
			z.clear.Add(int64(len(data)))
		}
		err := z.blobs.Put(context.Background(), must(space.Parse(r.GetDigest())), bytes.NewReader(data))
		answer.Responses = append(answer.Responses, &repb.BatchUpdateBlobsResponse_Response{
			Digest: r.GetDigest(), Status: &statuspb.Status{Code: int32(status.Code(answerTo(err)))},
		})
	}
	return answer, nil
}

func (z *shrinking) send(req *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
	name := must(digest.ParseRead(req.GetResourceName()))
	if name.Compressor != digest.Zstd {
		return status.Error(codes.FailedPrecondition, "only zstd here")
	}
	r, err := cas.OpenFrames(s.Context(), z.blobs, name.Digest, req.GetReadOffset())
	if err != nil {
		return answerTo(err)
	}
	buffer := make([]byte, 100_000)
	for {
		n, err := r.Read(buffer)
		if n > 0 {
			if err := s.Send(&bytestream.ReadResponse{Data: buffer[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return r.Close()
		}
		if err != nil {
			return answerTo(err)
		}
	}
}

func (z *shrinking) receive(s bytestream.ByteStream_WriteServer) error {
	m, err := s.Recv()
	if err != nil {
		return err
	}
	name := must(digest.ParseWrite(m.GetResourceName()))
	if name.Compressor != digest.Zstd {
		return status.Error(codes.FailedPrecondition, "only zstd here")
	}
	sent := int64(len(m.GetData()))
	data := m.GetData()
	body := readerFunc(func(p []byte) (int, error) {
		for len(data) == 0 {
			if m.GetFinishWrite() {
				return 0, io.EOF
			}
			if m, err = s.Recv(); errors.Is(err, io.EOF) {
				return 0, io.ErrUnexpectedEOF
			} else if err != nil {
				return 0, err
			}
			data = m.GetData()
			sent += int64(len(data))
		}
		n := copy(p, data)
		data = data[n:]
		return n, nil
	})
	decoder := compress.NewReader(body, name.Digest.Size())
	err = errors.Join(z.blobs.Put(s.Context(), name.Digest, decoder), decoder.Close())
	if err != nil {
		return answerTo(err)
	}
	if !m.GetFinishWrite() {
		sent = -1 // The blob was there.
	}
	// As some servers do (L-5).
	return s.SendAndClose(&bytestream.WriteResponse{CommittedSize: sent})
}

func TestZstdConformance(t *testing.T) {
	castest.Run(t, func(t testing.TB) cas.Store {
		t.Helper()
		z := newShrinking()
		return connect(t, startScript(t, &z.script))
	})
}

// TestZstdIsUsed: what compresses well travels compressed, in both directions.
func TestZstdIsUsed(t *testing.T) {
	z := newShrinking()
	c := connect(t, startScript(t, &z.script))
	for _, size := range []int{1000, 3 << 20} {
		data := append(random(16), bytes.Repeat([]byte("jetfarm "), size/8)...)
		d := put(t, c, data)
		wantBlob(t, c, d, data)
		r, err := c.Open(t.Context(), d, int64(size/2))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[size/2:]) {
			t.Errorf("the second half: %d bytes, error %v", len(got), err)
		}
	}
	if n := z.clear.Load(); n != 0 {
		t.Errorf("%d bytes travelled in the clear", n)
	}
}

// TestZstdThatIsWrong: bombs, damage and truncation are cas.ErrMismatch, and a source that fails in the
// middle of a compressed upload leaves nothing (audit rows 1 and 6).
func TestZstdThatIsWrong(t *testing.T) {
	data := append(random(16), bytes.Repeat([]byte("jetfarm "), 1<<17)...)
	d := space.Of(data)
	frame := compress.Append(nil, data)
	damagedFrame := bytes.Clone(frame)
	damagedFrame[len(frame)/2] ^= 0xff
	for name, sent := range map[string][]byte{
		"bomb":      compress.Append(nil, make([]byte, 1<<28)),
		"damaged":   damagedFrame,
		"truncated": frame[:len(frame)-5],
		"garbage":   append(bytes.Clone(frame), "garbage"...),
		"no zstd":   data,
		"nothing":   nil,
		"short":     compress.Append(nil, data[:1000]),
		"two":       append(bytes.Clone(frame), frame...),
	} {
		t.Run("audit 6 "+name, func(t *testing.T) {
			z := newShrinking()
			z.read = func(_ *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
				return s.Send(&bytestream.ReadResponse{Data: sent})
			}
			c := connect(t, startScript(t, &z.script))
			_, err := read(t.Context(), c, d)
			wantError(t, "reading", err, cas.ErrMismatch)
		})
	}
	t.Run("audit 1 the source of a compressed upload fails", func(t *testing.T) {
		z := newShrinking()
		c := connect(t, startScript(t, &z.script))
		broken := errors.New("the source failed")
		err := c.Put(t.Context(), d, io.MultiReader(bytes.NewReader(data[:len(data)/2]), readerFunc(func([]byte) (int, error) { return 0, broken })))
		if err != broken { //nolint:errorlint // as it is
			t.Errorf("Put: error %v, want %v", err, broken)
		}
		if has(t, z.blobs, d) {
			t.Error("half a blob is there")
		}
		if err := c.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
			t.Errorf("Put again: %v", err)
		}
		wantBlob(t, z.blobs, d, data)
	})
	t.Run("audit 1 D-41 the upstream ends a compressed transfer", func(t *testing.T) {
		z := newShrinking()
		gone := status.Error(codes.Unavailable, "gone")
		z.write = func(s bytestream.ByteStream_WriteServer) error {
			if _, err := s.Recv(); err != nil {
				return err
			}
			return gone
		}
		z.read = func(_ *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
			if err := s.Send(&bytestream.ReadResponse{Data: frame[:20]}); err != nil {
				return err
			}
			return gone
		}
		c := connect(t, startScript(t, &z.script), func(cfg *upstream.Config) { cfg.Probe = time.Hour })
		noise := random(8 << 20)
		for range 2 {
			wantError(t, "Put", c.Put(t.Context(), space.Of(noise), bytes.NewReader(noise)), cas.ErrUnavailable)
			_, err := read(t.Context(), c, d)
			wantError(t, "reading", err, cas.ErrUnavailable)
		}
	})
}
