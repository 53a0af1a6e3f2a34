package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
)

// httpError is what only an HTTP request can do wrong: invalid for all else that looks at it.
type httpError string

func (e httpError) Error() string { return string(e) }

func (httpError) Unwrap() error { return errInvalid }

const (
	errMethod       = httpError("method not allowed")
	errNoLength     = httpError("length required")
	errMediaType    = httpError("encoding not supported")
	errBodyTooLarge = httpError("body too large")
	errBadRange     = httpError("range not satisfiable")
	// errAbsent is an action result whose action is not in the CAS.
	errAbsent = httpError("precondition failed")
)

// errClientGone is a body that ended before its length.
var errClientGone = fmt.Errorf("the client went away: %w", context.Canceled)

// httpSentinels go before the status of the gRPC code.
var httpSentinels = []struct { //nolint:gochecknoglobals // a table that nothing changes
	sentinel error
	status   int
}{
	{errMethod, http.StatusMethodNotAllowed},
	{errNoLength, http.StatusLengthRequired},
	{errMediaType, http.StatusUnsupportedMediaType},
	{errBodyTooLarge, http.StatusRequestEntityTooLarge},
	{errBadRange, http.StatusRequestedRangeNotSatisfiable},
	{errAbsent, http.StatusPreconditionFailed},
	{errStalled, http.StatusRequestTimeout},
}

// httpStatus is the HTTP status of an error that has a gRPC code. 404 is a miss and nothing else:
// clients take any other status below 500 for their own mistake.
func httpStatus(err error, code codes.Code) int {
	for _, row := range httpSentinels {
		if errors.Is(err, row.sentinel) {
			return row.status
		}
	}
	switch code { //nolint:exhaustive // all others are 500
	case codes.InvalidArgument, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.NotFound:
		return http.StatusNotFound
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.FailedPrecondition:
		return http.StatusPreconditionFailed
	case codes.ResourceExhausted:
		return http.StatusInsufficientStorage
	case codes.Unavailable, codes.Canceled, codes.Aborted:
		return http.StatusServiceUnavailable
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

// httpAnswer is the client of one request. Each read from it and each write to it has the stall bound,
// so a slow client that moves is served for as long as it takes.
type httpAnswer struct {
	http.ResponseWriter
	control *http.ResponseController
	stall   time.Duration
	status  int // 0 until the headers were written
	written int64
	body    *httpBody
}

func newHTTPAnswer(w http.ResponseWriter, r *http.Request, stall time.Duration) *httpAnswer {
	a := &httpAnswer{ResponseWriter: w, control: http.NewResponseController(w), stall: stall}
	a.body = &httpBody{source: r.Body, control: a.control, stall: stall, expects: r.Header.Get("Expect") != ""}
	if r.ContentLength != 0 {
		// Whoever answers without reading leaves the rest of the body to the server, which discards it.
		a.body.extend()
	}
	return a
}

// Unwrap is for http.ResponseController.
func (a *httpAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (a *httpAnswer) WriteHeader(status int) {
	a.extend()
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (a *httpAnswer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.status = http.StatusOK // as the server's writer has it
	}
	a.extend()
	n, err := a.ResponseWriter.Write(p)
	a.written += int64(n)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w: it read nothing in %v", errStalled, a.stall)
	}
	return n, err
}

// extend gives the client another stall bound to read. A server without deadlines, which only tests
// have, is served without.
func (a *httpAnswer) extend() {
	_ = a.control.SetWriteDeadline(time.Now().Add(a.stall)) //nolint:errcheck // see above
}

// head writes the headers of an answer with length bytes.
func (a *httpAnswer) head(status int, length int64) {
	a.Header().Set("Content-Length", strconv.FormatInt(length, 10))
	a.WriteHeader(status)
}

// empty answers without a body.
func (a *httpAnswer) empty(status int) {
	if status != http.StatusNotModified {
		a.Header().Set("Content-Length", "0")
	}
	a.WriteHeader(status)
}

// fail answers with an error text.
func (a *httpAnswer) fail(status int, text string) {
	for _, name := range []string{"ETag", "Accept-Ranges", "Content-Encoding"} {
		a.Header().Del(name)
	}
	if status == http.StatusServiceUnavailable {
		a.Header().Set("Retry-After", retryAfterSeconds)
	}
	http.Error(a, text, status)
}

// httpBody is the body of a request. Its errors wrap errStalled or errClientGone or are the server's.
type httpBody struct {
	source  io.Reader
	control *http.ResponseController
	stall   time.Duration
	expects bool // the client waits for leave to send
	read    int64
}

func (b *httpBody) extend() {
	_ = b.control.SetReadDeadline(time.Now().Add(b.stall)) //nolint:errcheck // as for writes
}

// Read implements io.Reader.
func (b *httpBody) Read(p []byte) (int, error) {
	b.extend()
	n, err := b.source.Read(p)
	b.read += int64(n)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		// From here on the server itself reads, to see the client leave. It may wait for ever.
		_ = b.control.SetReadDeadline(time.Time{}) //nolint:errcheck // as for writes
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("%w: it sent nothing in %v", errStalled, b.stall)
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = errClientGone
	}
	return n, err
}

// discard reads what is left of a body, so that a client that sends before it reads gets its answer. A
// client that waits for leave to send is not asked to.
func (b *httpBody) discard() error {
	if b.expects && b.read == 0 {
		return nil
	}
	_, err := io.Copy(io.Discard, b)
	return err
}

// acceptsZstd tells whether a client takes zstd by name. Clients that take anything get what is cheapest
// for them, the blob itself.
func acceptsZstd(header http.Header) bool {
	for _, line := range header.Values("Accept-Encoding") {
		for coding := range strings.SplitSeq(line, ",") {
			name, weight, weighed := strings.Cut(coding, ";")
			if strings.TrimSpace(name) == "zstd" && (!weighed || strings.Trim(weight, " q=0.") != "") {
				return true
			}
		}
	}
	return false
}

// httpRange is the part of a blob that is asked for.
type httpRange struct {
	offset, length int64
	partial        bool
}

// rangeOf is the range that a request asks for. What is no single range of bytes, or is asked of
// another version of the blob, which does not exist, is the whole. The error wraps errBadRange.
func rangeOf(header http.Header, tag string, size int64) (httpRange, error) {
	whole := httpRange{length: size}
	spec, ok := strings.CutPrefix(header.Get("Range"), "bytes=")
	if condition := header.Get("If-Range"); !ok || (condition != "" && condition != tag) {
		return whole, nil
	}
	from, to, ok := strings.Cut(spec, "-")
	if !ok || strings.Contains(to, ",") {
		return whole, nil
	}
	number := func(s string) (int64, bool) {
		n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 63)
		return int64(n), err == nil
	}
	if from == "" { // the last bytes
		n, ok := number(to)
		if !ok {
			return whole, nil
		}
		if n == 0 || size == 0 {
			return whole, fmt.Errorf("%w: the last %d bytes of %d", errBadRange, n, size)
		}
		n = min(n, size)
		return httpRange{offset: size - n, length: n, partial: true}, nil
	}
	first, ok := number(from)
	if !ok {
		return whole, nil
	}
	last := size - 1
	if to != "" {
		n, ok := number(to)
		if !ok || n < first {
			return whole, nil
		}
		last = min(n, last)
	}
	if first >= size {
		return whole, fmt.Errorf("%w: byte %d of %d", errBadRange, first, size)
	}
	return httpRange{offset: first, length: last - first + 1, partial: true}, nil
}
