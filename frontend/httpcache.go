package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// httpCache serves Bazel's HTTP cache protocol (`--remote_cache=http://`) on the stores of the gRPC
// services and by their rules: a blob is verified before it is visible, the action cache is written
// by clients only where that is allowed, and a result is found only while all its blobs are.
//
// The protocol names blobs and actions by hash alone. cas.Find has their sizes, so an action's result
// is found only while the action itself is in the CAS, which is where clients put it first.
type httpCache struct {
	blobs     cas.Store
	actions   *actionCache
	instances Instances
	limits    Limits
	metrics   *metrics
	http      *httpMetrics
	buffers   httpBuffers
	opaque    bool // values that are no ActionResult are kept as well
}

// HTTP serves the HTTP cache, and leaves all other paths to other. It has to see requests before any
// router that cleans paths.
func (s *Server) HTTP(other http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		instance, store, function, hash, ok := httpCachePath(r.URL.EscapedPath())
		if !ok {
			other.ServeHTTP(w, r)
			return
		}
		a := newHTTPAnswer(w, r, s.cfg.Limits.Stall)
		end := s.http.http.begin(r.Method, store)
		err := s.guardHTTP(r.Context(), func() error {
			name, err := parseHTTPName(instance, store, function, hash)
			if err == nil {
				err = s.http.instances.Check(name.space.Instance())
			}
			if err != nil {
				return err
			}
			return s.http.serve(a, r, name)
		})
		promised := a.status != 0
		if err != nil {
			s.failHTTP(a, r, err)
		}
		end(a.status)
		if err != nil && promised {
			// What the headers said cannot be kept: the connection must not go on as if it were.
			panic(http.ErrAbortHandler)
		}
	})
}

// guardHTTP turns a panic of a handler into an error.
func (s *Server) guardHTTP(ctx context.Context, serve func() error) (err error) {
	defer func() { err = s.recovered(ctx, recover(), err) }()
	return serve()
}

// failHTTP answers with an error if nothing was answered yet, and logs it.
func (s *Server) failHTTP(a *httpAnswer, r *http.Request, err error) {
	ctx := r.Context()
	if from, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		ctx = peer.NewContext(ctx, &peer.Peer{Addr: net.TCPAddrFromAddrPort(from)})
	}
	status := statusOf(endOf(ctx, err), 1)
	s.logFailure(ctx, "HTTP "+s.http.http.method(r.Method), status.Code(), err)
	if errors.Is(err, errStalled) {
		s.metrics.stalls.Inc()
	}
	if a.status == 0 {
		a.fail(httpStatus(err, status.Code()), status.Message())
	}
}

func (h *httpCache) serve(a *httpAnswer, r *http.Request, name httpName) error {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		if name.store == httpActions {
			return h.getAction(a, r, name)
		}
		return h.getBlob(a, r, name)
	case http.MethodPut:
		size, err := bodySize(r)
		if err != nil {
			return err
		}
		if name.store == httpActions {
			return h.putAction(a, r, name, size)
		}
		return h.putBlob(a, r, name, size)
	}
	a.Header().Set("Allow", "GET, HEAD, PUT")
	return fmt.Errorf("%w: the HTTP cache knows GET, HEAD and PUT", errMethod)
}

// bodySize is the size of what a PUT brings. It must be known in advance, since it is a part of the
// blob's digest.
func bodySize(r *http.Request) (int64, error) {
	switch {
	case r.Header.Get("Content-Encoding") != "" && r.Header.Get("Content-Encoding") != "identity":
		return 0, fmt.Errorf("%w: Content-Encoding %s; blobs are sent as they are", errMediaType, digest.Quote(r.Header.Get("Content-Encoding")))
	case r.ContentLength < 0:
		return 0, fmt.Errorf("%w: a PUT needs a Content-Length", errNoLength)
	}
	return r.ContentLength, nil
}

// putBlob stores the body if it has the hash.
func (h *httpCache) putBlob(a *httpAnswer, r *http.Request, name httpName, size int64) error {
	if size > h.limits.MaxBlobBytes {
		return fmt.Errorf("%w: the body has %d bytes, at most %d are stored", errBodyTooLarge, size, h.limits.MaxBlobBytes)
	}
	d, err := name.space.New(name.hash, size)
	if err != nil {
		return err
	}
	if d.IsImpossible() {
		return fmt.Errorf("%w: no blob of %d bytes has the hash %s", errInvalid, size, name.hash)
	}
	missing, err := h.blobs.Missing(r.Context(), []digest.Digest{d})
	if err != nil {
		return err
	}
	status := http.StatusOK
	if len(missing) > 0 {
		status = http.StatusCreated
		err := h.blobs.Put(r.Context(), d, a.body)
		h.metrics.received.WithLabelValues("http").Add(float64(a.body.read))
		if err != nil {
			return err
		}
	}
	if err := a.body.discard(); err != nil {
		return err
	}
	a.empty(status)
	return nil
}

// getBlob answers with a blob or a range of it.
func (h *httpCache) getBlob(a *httpAnswer, r *http.Request, name httpName) error {
	d, err := cas.Find(r.Context(), h.blobs, name.space, name.hash)
	if err != nil {
		return err
	}
	header := a.Header()
	tag := `"` + d.Hash() + `"`
	header.Set("ETag", tag)
	header.Set("Accept-Ranges", "bytes")
	header.Set("Content-Type", "application/octet-stream")
	if r.Header.Get("If-None-Match") == tag {
		if err := h.present(r.Context(), d); err != nil {
			return err
		}
		a.empty(http.StatusNotModified)
		return nil
	}
	part, err := rangeOf(r.Header, tag, d.Size())
	if err != nil {
		header.Set("Content-Range", "bytes */"+strconv.FormatInt(d.Size(), 10))
		return err
	}
	status := http.StatusOK
	if part.partial {
		status = http.StatusPartialContent
		header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", part.offset, part.offset+part.length-1, d.Size()))
	}
	if r.Method == http.MethodHead {
		if err := h.present(r.Context(), d); err != nil {
			return err
		}
		a.head(status, part.length)
		return nil
	}
	if !part.partial && d.Size() > 0 && acceptsZstd(r.Header) {
		return h.sendFrames(a, r, d)
	}
	in, err := h.blobs.Open(r.Context(), d, part.offset)
	if err != nil {
		return onRead(err)
	}
	defer in.Close() //nolint:errcheck // what it had to say came with its end
	before := a.written
	err = h.send(a, in, status, part.length, part.offset+part.length == d.Size())
	h.metrics.sent.WithLabelValues("http").Add(float64(a.written - before))
	return onRead(err)
}

// sendFrames answers with a whole blob compressed by zstd, by the chunks of HTTP, since nobody knows how
// long it will be. A blob that turns out to be damaged ends without the last chunk.
func (h *httpCache) sendFrames(a *httpAnswer, r *http.Request, d digest.Digest) error {
	in, err := cas.OpenFrames(r.Context(), h.blobs, d, 0)
	if err != nil {
		return onRead(err)
	}
	defer in.Close() //nolint:errcheck // what it had to say came with its end
	header := a.Header()
	header.Set("Content-Encoding", "zstd")
	header.Set("Vary", "Accept-Encoding")
	header.Set("ETag", `"`+d.Hash()+`+zstd"`)
	header.Del("Accept-Ranges")
	pair := h.buffers.get()
	defer h.buffers.pool.Put(pair)
	// Only Write of the answer has the stall bound, not the shortcuts of the server's own writer.
	_, err = io.CopyBuffer(struct{ io.Writer }{a}, struct{ io.Reader }{in}, pair[0][:])
	h.metrics.sent.WithLabelValues("http").Add(float64(a.written))
	return onRead(err)
}

// present is an error unless the blob is there; asking keeps it.
func (h *httpCache) present(ctx context.Context, d digest.Digest) error {
	missing, err := h.blobs.Missing(ctx, []digest.Digest{d})
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%w: %v", cas.ErrNotFound, d)
	}
	return err
}

// getAction answers with an action's result while all its blobs are there. Being asked for keeps the
// action, without which the result would not be found.
func (h *httpCache) getAction(a *httpAnswer, r *http.Request, name httpName) error {
	ctx, cancel := context.WithTimeoutCause(r.Context(), h.limits.Unary, errSlow)
	defer cancel()
	data, err := h.result(ctx, name)
	if h.opaque && err != nil && statusOf(err, 0).Code() == codes.NotFound {
		data, err = h.getOpaque(ctx, name)
	}
	if err != nil {
		return err
	}
	a.Header().Set("Content-Type", "application/octet-stream")
	a.head(http.StatusOK, int64(len(data)))
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = a.Write(data)
	return err
}

// result is the encoded result of an action that is in the CAS.
func (h *httpCache) result(ctx context.Context, name httpName) ([]byte, error) {
	action, err := cas.Find(ctx, h.blobs, name.space, name.hash)
	if err != nil {
		return nil, err
	}
	result, err := lookup(ctx, h.actions.actions, action, h.metrics)
	if err != nil {
		return nil, err
	}
	if _, err := h.blobs.Missing(ctx, []digest.Digest{action}); err != nil {
		return nil, err
	}
	data, err := proto.Marshal(result)
	if err != nil {
		return nil, fmt.Errorf("encode the result of action %v: %w", action, err)
	}
	return data, nil
}

// putAction is UpdateActionResult.
func (h *httpCache) putAction(a *httpAnswer, r *http.Request, name httpName, size int64) error {
	if !h.actions.updates {
		return fmt.Errorf("%w: clients may not write the action cache of this farm (its operator allows it with --action-cache-updates)", errDenied)
	}
	if size > int64(h.limits.MaxResultBytes) {
		return fmt.Errorf("%w: the action result has %d bytes, at most %d are stored", errBodyTooLarge, size, h.limits.MaxResultBytes)
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(a.body, data); err != nil {
		return err
	}
	if err := a.body.discard(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(r.Context(), h.limits.Unary, errSlow)
	defer cancel()
	err := h.putResult(ctx, name, data)
	if h.opaque && (errors.Is(err, errInvalid) || errors.Is(err, errAbsent)) {
		err = h.putOpaque(ctx, name, data)
	}
	if err != nil {
		return err
	}
	a.empty(http.StatusCreated)
	return nil
}

// putResult stores the encoded result of an action that is in the CAS.
func (h *httpCache) putResult(ctx context.Context, name httpName, data []byte) error {
	result := new(repb.ActionResult)
	if err := proto.Unmarshal(data, result); err != nil {
		return fmt.Errorf("%w: the body is not an ActionResult (the operator allows other values with --http-opaque-results)", errInvalid)
	}
	action, err := cas.Find(ctx, h.blobs, name.space, name.hash)
	if errors.Is(err, cas.ErrNotFound) {
		return fmt.Errorf("%w: action %s is not in the CAS; upload it before its result", errAbsent, name.hash)
	}
	if err != nil {
		return err
	}
	_, err = h.actions.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{
		InstanceName: name.space.Instance(), DigestFunction: name.space.Function().Proto(),
		ActionDigest: action.Proto(), ActionResult: result,
	})
	return err
}

// retryAfterSeconds is what Retry-After tells clients of a transient failure.
var retryAfterSeconds = strconv.Itoa(int(retryAfter / time.Second)) //nolint:gochecknoglobals // a constant
