package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"github.com/jetfarm/jetfarm/frontend/spool"
)

// Config is what a Fetcher needs. Zero bounds take their defaults.
type Config struct {
	Spool *spool.Pool
	// Allow are networks that are fetched from though they are not public.
	Allow []netip.Prefix
	// MaxBytes bounds what one origin sends. 4 GiB by default.
	MaxBytes int64
	// Stall bounds how long an origin may send nothing. 30 s by default.
	Stall time.Duration
	// TLS is for origins with certificates of their own; nil trusts those that the system trusts.
	TLS *tls.Config
	// Resolver resolves names; nil is the system's.
	Resolver *net.Resolver
}

const (
	maxRedirects = 10
	maxHeader    = 64 << 10
	maxURL       = 16 << 10
)

// Fetcher downloads. Its methods may be called concurrently; how many at once is the caller's affair.
type Fetcher struct {
	cfg       Config
	transport *http.Transport
}

// New returns a Fetcher.
func New(cfg Config) *Fetcher {
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = 4 << 30
	}
	if cfg.Stall == 0 {
		cfg.Stall = 30 * time.Second
	}
	dialer := &net.Dialer{Timeout: cfg.Stall, Control: guard{cfg.Allow}.control, Resolver: cfg.Resolver}
	return &Fetcher{cfg: cfg, transport: &http.Transport{
		Proxy: nil, DialContext: dialer.DialContext, TLSClientConfig: cfg.TLS, ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: cfg.Stall, ResponseHeaderTimeout: cfg.Stall, MaxResponseHeaderBytes: maxHeader,
		DisableCompression: true, MaxIdleConns: 16, IdleConnTimeout: 30 * time.Second,
	}}
}

// Close closes the connections that are kept open for later fetches.
func (f *Fetcher) Close() { f.transport.CloseIdleConnections() }

// Get downloads what is at a URL. The header is sent to the URL's own origin, not to one that it
// redirects to. Everything received is also written to sinks. The file is the caller's; errors are
// those of this package, or the cause of ctx when that was cancelled.
func (f *Fetcher) Get(ctx context.Context, from string, header http.Header, sinks ...io.Writer) (*spool.File, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := newWatchdog(f.cfg.Stall, cancel)
	defer watch.stop()
	resp, err := f.follow(ctx, from, header, watch)
	if err != nil {
		return nil, classify(ctx, err)
	}
	file := f.cfg.Spool.New()
	err = f.receive(resp, file, watch, sinks)
	resp.Body.Close() //nolint:errcheck // all that counts was read, or has failed
	if err != nil {
		return nil, errors.Join(classify(ctx, err), file.Close())
	}
	return file, nil
}

// follow requests a URL and those that it redirects to, and returns the answer with the content.
func (f *Fetcher) follow(ctx context.Context, from string, header http.Header, watch *watchdog) (*http.Response, error) {
	first, err := parse(from)
	if err != nil {
		return nil, err
	}
	at := first
	for range maxRedirects + 1 {
		req, err := request(ctx, first, at, header)
		if err != nil {
			return nil, err
		}
		resp, err := f.transport.RoundTrip(req)
		watch.moved()
		if err != nil {
			return nil, hide(err)
		}
		switch resp.StatusCode {
		case http.StatusOK:
			return resp, nil
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			resp.Body.Close() //nolint:errcheck // it is not read
			return nil, answered(resp.StatusCode)
		}
		resp.Body.Close() //nolint:errcheck // it is not read
		if at, err = location(at, resp); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: more than %d redirects", ErrFailed, maxRedirects)
}

// request makes the request for a URL. What the client gave is sent to the origin of the first only.
func request(ctx context.Context, first, at *url.URL, header http.Header) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFailed, hide(err))
	}
	req.URL.User = nil
	if sameOrigin(first, at) {
		maps.Copy(req.Header, header)
		if user := first.User; user != nil && req.Header.Get("Authorization") == "" {
			password, _ := user.Password()
			req.SetBasicAuth(user.Username(), password)
		}
	}
	for name, value := range map[string]string{"User-Agent": "jetfarm", "Accept": "*/*", "Accept-Encoding": "identity"} {
		if req.Header.Get(name) == "" {
			req.Header.Set(name, value)
		}
	}
	return req, nil
}

// location is where a redirect leads.
func location(from *url.URL, resp *http.Response) (*url.URL, error) {
	text := resp.Header.Get("Location")
	to, err := from.Parse(text)
	if err != nil || text == "" {
		return nil, fmt.Errorf("%w: a redirect without a valid location", ErrFailed)
	}
	to, err = parse(to.String())
	if err != nil {
		return nil, fmt.Errorf("redirect: %w", err)
	}
	return to, nil
}

// receive writes the body into the file and the sinks.
func (f *Fetcher) receive(resp *http.Response, file *spool.File, watch *watchdog, sinks []io.Writer) error {
	if resp.ContentLength > f.cfg.MaxBytes {
		return fmt.Errorf("%w: it has %d bytes, at most %d are fetched", ErrExhausted, resp.ContentLength, f.cfg.MaxBytes)
	}
	to := io.MultiWriter(append([]io.Writer{file}, sinks...)...)
	n, err := io.Copy(to, io.LimitReader(watchedReader{resp.Body, watch}, f.cfg.MaxBytes+1))
	if err != nil {
		return err
	}
	if n > f.cfg.MaxBytes {
		return fmt.Errorf("%w: it has more than %d bytes", ErrExhausted, f.cfg.MaxBytes)
	}
	return nil
}

// parse accepts URLs of the web only.
func parse(text string) (*url.URL, error) {
	if len(text) > maxURL {
		return nil, fmt.Errorf("%w: the URL has %d bytes, at most %d are allowed", ErrDenied, len(text), maxURL)
	}
	u, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%w: not a URL", ErrDenied)
	}
	switch u.Scheme {
	case "http", "https":
	case "", "urn": // names of what is pushed
		return nil, fmt.Errorf("%w: it is no URL of an origin", ErrNotFound)
	default:
		return nil, fmt.Errorf("%w: scheme %q; only http and https are fetched", ErrDenied, u.Scheme)
	}
	if u.Hostname() == "" {
		return nil, fmt.Errorf("%w: the URL has no host", ErrDenied)
	}
	u.Fragment = ""
	return u, nil
}

// hide removes the URL from an error of the HTTP client: it may hold credentials.
func hide(err error) error {
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		return wrapped.Err
	}
	return err
}

func sameOrigin(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && a.Hostname() == b.Hostname() && port(a) == port(b)
}

func port(u *url.URL) string {
	switch {
	case u.Port() != "":
		return u.Port()
	case u.Scheme == "https":
		return "443"
	}
	return "80"
}

// watchdog ends a fetch whose origin sends nothing.
type watchdog struct {
	timer *time.Timer
	bound time.Duration
}

func newWatchdog(bound time.Duration, cancel context.CancelCauseFunc) *watchdog {
	return &watchdog{bound: bound, timer: time.AfterFunc(bound, func() {
		cancel(fmt.Errorf("%w: it sent nothing in %v", ErrTimeout, bound))
	})}
}

func (w *watchdog) moved() { w.timer.Reset(w.bound) }

func (w *watchdog) stop() { w.timer.Stop() }

// watchedReader tells the watchdog of every byte.
type watchedReader struct {
	io.Reader
	watch *watchdog
}

func (r watchedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.watch.moved()
	}
	return n, err
}
