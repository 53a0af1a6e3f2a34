package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/upstream"
)

func TestUploads(t *testing.T) {
	t.Run("audit 4 D-35 an upstream that has the blob ends the upload, which is success", func(t *testing.T) {
		f := startFarm(t)
		c := connect(t, f.address)
		d, data := add(t, f.blobs, 64<<20)
		read := 0
		err := c.Put(t.Context(), d, readerFunc(func(p []byte) (int, error) {
			if read == len(data) {
				return 0, io.EOF
			}
			n := copy(p, data[read:])
			read += n
			return n, nil
		}))
		if err != nil {
			t.Errorf("Put: %v", err)
		}
		if read == len(data) {
			t.Error("all of the blob was read")
		}
	})
	for code, want := range map[codes.Code]error{
		codes.ResourceExhausted: cas.ErrUnavailable, codes.Unavailable: cas.ErrUnavailable, codes.Internal: cas.ErrUnavailable,
		codes.InvalidArgument: upstream.ErrRefused, codes.PermissionDenied: upstream.ErrRefused, codes.NotFound: upstream.ErrRefused,
	} {
		t.Run("audit 4 an upstream that fails early ends the upload with "+code.String(), func(t *testing.T) {
			c := connect(t, startScript(t, &script{
				write: func(bytestream.ByteStream_WriteServer) error { return status.Error(code, "no") },
				update: func(*repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
					return nil, status.Error(code, "no")
				},
			}))
			for _, size := range []int{1000, 64 << 20} {
				data := random(size)
				err := c.Put(t.Context(), space.Of(data), bytes.NewReader(data))
				wantError(t, "Put", err, want)
				if errors.Is(err, cas.ErrNotFound) || errors.Is(err, cas.ErrMismatch) {
					t.Errorf("Put: error %v", err)
				}
			}
		})
	}
	t.Run("audit 3 a source that blocks until the call is cancelled leaves nothing", func(t *testing.T) {
		f := startFarm(t)
		c := connect(t, f.address)
		data := random(8 << 20)
		d := space.Of(data)
		ctx, cancel := context.WithCancelCause(t.Context())
		err := c.Put(ctx, d, io.MultiReader(bytes.NewReader(data[:4<<20]), readerFunc(func([]byte) (int, error) {
			cancel(errStop)
			<-ctx.Done()
			return 0, context.Cause(ctx)
		})))
		wantError(t, "Put", err, errStop)
		eventually(t, "the end of the upstream's call", func() bool { return f.calls(t) == 0 })
		if has(t, f.blobs, d) {
			t.Error("half a blob is there")
		}
	})
	t.Run("audit D-42 a source that fails cancels the upload", func(t *testing.T) {
		f := startFarm(t)
		c := connect(t, f.address)
		data := random(8 << 20)
		broken := errors.New("the source failed")
		err := c.Put(t.Context(), space.Of(data), io.MultiReader(bytes.NewReader(data[:4<<20]), readerFunc(func([]byte) (int, error) { return 0, broken })))
		if err != broken { //nolint:errorlint // as it is
			t.Errorf("Put: error %v, want %v", err, broken)
		}
		eventually(t, "the end of the upstream's call", func() bool { return f.calls(t) == 0 })
	})
	// Servers differ in the committed size of what they have already or got compressed (L-5).
	for committed, want := range map[int64]error{1 << 20: nil, -1: nil, 0: cas.ErrUnavailable, 1<<20 - 1: cas.ErrUnavailable} {
		t.Run(fmt.Sprintf("a committed size of %d", committed), func(t *testing.T) {
			c := connect(t, startScript(t, &script{write: func(s bytestream.ByteStream_WriteServer) error {
				for {
					if m, err := s.Recv(); err != nil || m.GetFinishWrite() {
						break
					}
				}
				return s.SendAndClose(&bytestream.WriteResponse{CommittedSize: committed})
			}}))
			data := random(1 << 20)
			wantError(t, "Put", c.Put(t.Context(), space.Of(data), bytes.NewReader(data)), want)
		})
	}
}

// TestLies has an upstream that breaks the rules.
func TestLies(t *testing.T) {
	data := random(1000)
	small := space.Of(data)
	answer := func(r ...*repb.BatchReadBlobsResponse_Response) func(*repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
		return func(*repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
			return &repb.BatchReadBlobsResponse{Responses: r}, nil
		}
	}
	one := func(data []byte, code codes.Code) *repb.BatchReadBlobsResponse_Response {
		return &repb.BatchReadBlobsResponse_Response{Digest: small.Proto(), Data: data, Status: &statuspb.Status{Code: int32(code)}}
	}
	for name, test := range map[string]struct {
		answer func(*repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error)
		want   error
	}{
		"right":                       {answer(one(data, codes.OK)), nil},
		"absent":                      {answer(one(nil, codes.NotFound)), cas.ErrNotFound},
		"wrong bytes":                 {answer(one(make([]byte, 1000), codes.OK)), cas.ErrMismatch},
		"short":                       {answer(one(data[:999], codes.OK)), cas.ErrMismatch},
		"long":                        {answer(one(append(bytes.Clone(data), 1), codes.OK)), cas.ErrMismatch},
		"no answer for the blob":      {answer(), cas.ErrUnavailable},
		"overloaded":                  {answer(one(nil, codes.ResourceExhausted)), cas.ErrUnavailable},
		"a compressor nobody wanted":  {answer(&repb.BatchReadBlobsResponse_Response{Digest: small.Proto(), Data: data, Compressor: repb.Compressor_BROTLI}), cas.ErrUnavailable},
		"the answer for another blob": {answer(&repb.BatchReadBlobsResponse_Response{Digest: space.Of(nil).Proto()}, one(data, codes.OK)), nil},
	} {
		t.Run("a small blob, "+name, func(t *testing.T) {
			c := connect(t, startScript(t, &script{readBatch: test.answer}))
			got, err := read(t.Context(), c, small)
			wantError(t, "reading", err, test.want)
			if err == nil && !bytes.Equal(got, data) {
				t.Error("wrong bytes")
			}
		})
	}

	data = random(1 << 20)
	large := space.Of(data)
	flipped := bytes.Clone(data)
	flipped[len(data)-1] ^= 1
	for name, test := range map[string]struct {
		sent []byte
		end  error
		want error
	}{
		"right":         {data, nil, nil},
		"short":         {data[:1<<19], nil, cas.ErrMismatch},
		"nothing":       {nil, nil, cas.ErrMismatch},
		"long":          {append(bytes.Clone(data), data...), nil, cas.ErrMismatch},
		"wrong":         {flipped, nil, cas.ErrMismatch},
		"breaks off":    {data[:1<<19], status.Error(codes.Unavailable, "gone"), cas.ErrUnavailable},
		"damaged there": {data[:1<<19], status.Error(codes.DataLoss, "bad"), cas.ErrMismatch},
		"absent":        {nil, status.Error(codes.NotFound, "no such blob"), cas.ErrNotFound},
	} {
		t.Run("a large blob, "+name, func(t *testing.T) {
			c := connect(t, startScript(t, &script{read: func(_ *bytestream.ReadRequest, s bytestream.ByteStream_ReadServer) error {
				for sent := test.sent; len(sent) > 0; sent = sent[min(len(sent), 100_000):] {
					if err := s.Send(&bytestream.ReadResponse{Data: sent[:min(len(sent), 100_000)]}); err != nil {
						return err
					}
				}
				return test.end
			}}))
			got, err := read(t.Context(), c, large)
			wantError(t, "reading", err, test.want)
			if err == nil && !bytes.Equal(got, data) {
				t.Error("wrong bytes")
			}
			if errors.Is(test.want, cas.ErrNotFound) {
				if r, err := c.Open(t.Context(), large, 0); err == nil {
					r.Close()
					t.Error("an absent blob was opened")
				}
			}
		})
	}
}

// TestMissingIsSplit asks for more digests than a message has room for.
func TestMissingIsSplit(t *testing.T) {
	var largest atomic.Int64
	s := &script{find: func(req *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
		n := int64(len(req.GetBlobDigests()))
		for old := largest.Load(); n > old && !largest.CompareAndSwap(old, n); old = largest.Load() {
		}
		answer := &repb.FindMissingBlobsResponse{}
		for _, d := range req.GetBlobDigests() {
			if d.GetSizeBytes()%2 == 0 {
				answer.MissingBlobDigests = append(answer.MissingBlobDigests, d)
			}
		}
		return answer, nil
	}}
	c := connect(t, startScript(t, s))
	var ds []digest.Digest
	hash := space.Of([]byte("x")).Hash()
	for i := range 65_000 {
		ds = append(ds, must(space.New(hash, int64(i+1))))
	}
	missing, err := c.Missing(t.Context(), append(ds, ds[0], ds[1]))
	if err != nil || len(missing) != len(ds)/2 || missing[0] != ds[1] {
		t.Errorf("%d of %d are missing, error %v", len(missing), len(ds), err)
	}
	if n := s.count("FindMissingBlobs"); n < 2 || largest.Load() > 10_000 {
		t.Errorf("%d calls with up to %d digests", n, largest.Load())
	}
}

// TestHeadersAreSentAndNotLogged logs everything while calls fail and succeed.
func TestHeadersAreSentAndNotLogged(t *testing.T) {
	const secret = "Bearer not-for-logs"
	var log bytes.Buffer
	s := &script{}
	header, err := upstream.ParseHeaders([]string{"Authorization=" + secret, "x-team=a=b"})
	if err != nil {
		t.Fatal(err)
	}
	c := connect(t, startScript(t, s), func(cfg *upstream.Config) {
		cfg.Header, cfg.Log = header, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	data := random(1 << 20)
	_, err = read(t.Context(), c, space.Of(data))
	wantError(t, "reading", err, upstream.ErrRefused)
	err = errors.Join(err, c.Put(t.Context(), space.Of(data), bytes.NewReader(data)))
	if _, err := c.Missing(t.Context(), []digest.Digest{space.Of(data)}); err == nil {
		t.Error("no error")
	}
	headers := s.seen()
	for i, md := range headers {
		if got := md.Get("authorization"); len(got) != 1 || got[0] != secret || md.Get("x-team")[0] != "a=b" {
			t.Errorf("call %d has the headers %v", i, md)
		}
	}
	if len(headers) < 4 {
		t.Errorf("%d calls were made", len(headers))
	}
	if strings.Contains(log.String()+err.Error(), "not-for-logs") {
		t.Errorf("the secret is in %s or %v", log.String(), err)
	}
}

// TestWritesThatAreForbidden: they are not tried again, and the log says so once.
func TestWritesThatAreForbidden(t *testing.T) {
	var log bytes.Buffer
	denied := status.Error(codes.PermissionDenied, "read only")
	s := &script{
		write:  func(bytestream.ByteStream_WriteServer) error { return denied },
		update: func(*repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) { return nil, denied },
		store:  func(*repb.UpdateActionResultRequest) (*repb.ActionResult, error) { return nil, denied },
	}
	c := connect(t, startScript(t, s), func(cfg *upstream.Config) {
		cfg.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	})
	for range 5 {
		data := random(100)
		wantError(t, "Put", c.Put(t.Context(), space.Of(data), bytes.NewReader(data)), upstream.ErrRefused)
		wantError(t, "Update", c.Update(t.Context(), space.Of(data), &repb.ActionResult{}), upstream.ErrRefused)
	}
	if s.count("BatchUpdateBlobs") != 1 || s.count("UpdateActionResult") != 1 {
		t.Error("the upstream was called again")
	}
	if n := strings.Count(log.String(), "forbids writes"); n != 2 {
		t.Errorf("%d warnings, want one for blobs and one for results:\n%s", n, log.String())
	}
}

func TestCapabilitiesAreLearned(t *testing.T) {
	s := &script{
		find: func(*repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
			return &repb.FindMissingBlobsResponse{}, nil
		},
		store:        func(*repb.UpdateActionResultRequest) (*repb.ActionResult, error) { return &repb.ActionResult{}, nil },
		capabilities: &repb.CacheCapabilities{DigestFunctions: []repb.DigestFunction_Value{repb.DigestFunction_SHA384}, MaxCasBlobSizeBytes: 1000},
	}
	c := connect(t, startScript(t, s), func(cfg *upstream.Config) { cfg.Relearn = time.Millisecond })
	data := random(2000)
	d := space.Of(data)
	_, err := c.Open(t.Context(), d, 0)
	wantError(t, "Open in a digest function that it has not", err, cas.ErrNotFound)
	wantError(t, "Put in a digest function that it has not", c.Put(t.Context(), d, bytes.NewReader(data)), upstream.ErrRefused)
	if missing, err := c.Missing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
		t.Errorf("Missing in a digest function that it has not: %v, %v", missing, err)
	}
	wantError(t, "Update", c.Update(t.Context(), d, &repb.ActionResult{}), upstream.ErrRefused)
	s.set(func(c *repb.CacheCapabilities) {
		c.DigestFunctions = []repb.DigestFunction_Value{repb.DigestFunction_SHA256}
	})
	run(t, c.Run)
	eventually(t, "the new digest function", func() bool {
		missing, err := c.Missing(t.Context(), []digest.Digest{d})
		return err == nil && len(missing) == 0
	})
	wantError(t, "Put of a blob that is too large", c.Put(t.Context(), d, bytes.NewReader(data)), upstream.ErrRefused)
	wantError(t, "Update without updates", c.Update(t.Context(), d, &repb.ActionResult{}), upstream.ErrRefused)
	s.set(func(c *repb.CacheCapabilities) {
		c.ActionCacheUpdateCapabilities = &repb.ActionCacheUpdateCapabilities{UpdateEnabled: true}
	})
	eventually(t, "updates", func() bool { return c.Update(t.Context(), d, &repb.ActionResult{}) == nil })
}
