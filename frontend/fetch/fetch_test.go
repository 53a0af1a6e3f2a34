package fetch_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/jetfarm/jetfarm/frontend/fetch"
	"github.com/jetfarm/jetfarm/frontend/spool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}

// newFetcher returns a fetcher that may fetch from this machine.
func newFetcher(t testing.TB, changes ...func(*fetch.Config)) *fetch.Fetcher {
	t.Helper()
	pool := spool.NewPool(t.TempDir(), 1<<30)
	cfg := fetch.Config{Spool: pool, Allow: loopback}
	for _, change := range changes {
		change(&cfg)
	}
	f := fetch.New(cfg)
	t.Cleanup(func() {
		f.Close()
		if n := pool.Used(); n != 0 {
			t.Errorf("%d bytes of the spool are still used", n)
		}
	})
	return f
}

// get fetches a URL and returns what came.
func get(ctx context.Context, f *fetch.Fetcher, url string, header http.Header) (string, error) {
	file, err := f.Get(ctx, url, header)
	if err != nil {
		return "", err
	}
	data, err := io.ReadAll(file.Reader())
	return string(data), errors.Join(err, file.Close())
}

func serve(t testing.TB, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

func TestGet(t *testing.T) {
	large := strings.Repeat("0123456789", 100_000)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = io.WriteString(z, large) //nolint:errcheck // into memory
	_ = z.Close()
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/large":
			fmt.Fprint(w, large)
		case "/gzip":
			w.Header().Set("Content-Encoding", "gzip")
			fmt.Fprint(w, zipped.String())
		case "/headers":
			fmt.Fprint(w, r.Header.Get("Authorization"), " ", r.Header.Get("X-Mine"), " ", r.Header.Get("Accept-Encoding"), " ", r.URL.RawQuery)
		case "/empty":
		default:
			status, err := strconv.Atoi(r.URL.Path[1:])
			if err != nil {
				status = http.StatusTeapot
			}
			w.WriteHeader(status)
		}
	})
	f := newFetcher(t)
	for path, want := range map[string]string{"/large": large, "/gzip": zipped.String(), "/empty": ""} {
		if got, err := get(t.Context(), f, s.URL+path, nil); err != nil || got != want {
			t.Errorf("%s: %d bytes, %v", path, len(got), err)
		}
	}
	got, err := get(t.Context(), f, strings.Replace(s.URL, "http://", "http://user:word@", 1)+"/headers?a=b#c", http.Header{"X-Mine": {"1"}})
	if want := "Basic dXNlcjp3b3Jk 1 identity a=b"; err != nil || got != want {
		t.Errorf("headers: %q, %v, want %q", got, err, want)
	}
	hash := sha256.New()
	file, err := f.Get(t.Context(), s.URL+"/large", nil, hash)
	if err != nil || file.Close() != nil || !bytes.Equal(hash.Sum(nil), sum(large)) {
		t.Errorf("a sink: %v", err)
	}
	for status, want := range map[int]error{
		404: fetch.ErrNotFound, 410: fetch.ErrNotFound, 401: fetch.ErrDenied, 403: fetch.ErrDenied, 429: fetch.ErrExhausted,
		408: fetch.ErrTimeout, 504: fetch.ErrTimeout, 500: fetch.ErrFailed, 503: fetch.ErrFailed, 204: fetch.ErrFailed, 206: fetch.ErrFailed, 304: fetch.ErrFailed,
	} {
		if _, err := get(t.Context(), f, s.URL+"/"+strconv.Itoa(status), nil); !errors.Is(err, want) {
			t.Errorf("status %d: error %v, want %v", status, err, want)
		}
	}
}

func sum(s string) []byte {
	h := sha256.Sum256([]byte(s))
	return h[:]
}

func TestURLs(t *testing.T) {
	f := newFetcher(t)
	for url, want := range map[string]error{
		"file:///etc/passwd": fetch.ErrDenied, "ftp://example.com/x": fetch.ErrDenied, "gopher://127.0.0.1/": fetch.ErrDenied,
		"unix:///run/docker.sock": fetch.ErrDenied, "javascript:1": fetch.ErrDenied, "http://": fetch.ErrDenied, "http:///x": fetch.ErrDenied,
		"http://:80/": fetch.ErrDenied, "http://[::1": fetch.ErrDenied, "http://a b/": fetch.ErrDenied, "http://" + strings.Repeat("x", 20_000): fetch.ErrDenied,
		"urn:uuid:1234": fetch.ErrNotFound, "name": fetch.ErrNotFound,
		"http://169.254.169.254/latest/meta-data": fetch.ErrDenied, "http://10.0.0.1/": fetch.ErrDenied, "http://0.0.0.0/": fetch.ErrDenied,
		"http://127.0.0.2/": fetch.ErrDenied, "http://0x7f000002/": fetch.ErrNotFound, "http://2130706434/": fetch.ErrNotFound,
		"http://user:secret@10.0.0.1/": fetch.ErrDenied,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		_, err := get(ctx, f, url, nil)
		cancel()
		if err == nil || (!errors.Is(err, want) && errors.Is(want, fetch.ErrDenied)) {
			t.Errorf("%.50s: error %v, want %v", url, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error has the password: %v", err)
		}
	}
}

func TestAddresses(t *testing.T) {
	allowed := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")}
	for address, public := range map[string]bool{
		"8.8.8.8": true, "1.1.1.1": true, "172.15.255.255": true, "172.32.0.1": true, "100.63.0.1": true, "223.255.255.1": true,
		"2606:4700::1111": true, "2a00:1450:4001::1": true, "10.1.2.3": true, "fd12::1": true, "::ffff:8.8.8.8": true, "::ffff:10.1.0.1": true,
		"127.0.0.1": false, "127.255.255.254": false, "0.0.0.0": false, "0.1.2.3": false, "10.0.0.1": false, "10.2.0.1": false,
		"172.16.0.1": false, "172.31.255.255": false, "192.168.0.1": false, "169.254.169.254": false, "100.64.0.1": false, "100.127.255.255": false,
		"192.0.0.1": false, "192.0.2.1": false, "198.18.0.1": false, "198.51.100.1": false, "203.0.113.1": false, "224.0.0.1": false,
		"239.255.255.250": false, "240.0.0.1": false, "255.255.255.255": false,
		"::": false, "::1": false, "fe80::1": false, "fe80::1%eth0": false, "fc00::1": false, "fec0::1": false, "ff02::1": false,
		"::ffff:127.0.0.1": false, "::ffff:169.254.169.254": false, "::127.0.0.1": false, "64:ff9b::7f00:1": false, "64:ff9b:1::1": false,
		"2002:7f00:1::": false, "2001::1": false, "2001:db8::1": false, "100::1": false, "5f00::1": false, "3fff::1": false,
	} {
		err := fetch.CheckAddress(allowed, netip.MustParseAddr(address))
		if (err == nil) != public || (err != nil && !errors.Is(err, fetch.ErrBlocked)) {
			t.Errorf("%s: error %v, want public %v", address, err, public)
		}
	}
	if err := fetch.CheckAddress(nil, netip.Addr{}); !errors.Is(err, fetch.ErrBlocked) {
		t.Errorf("no address: error %v", err)
	}
}

func TestRedirects(t *testing.T) {
	var other *httptest.Server
	seen := func(r *http.Request) string {
		return r.Header.Get("Authorization") + r.Header.Get("X-Token") + r.Header.Get("Cookie")
	}
	other = serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "other ", seen(r)) })
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		to := map[string]string{
			"/here": "/end", "/other": other.URL + "/x", "/private": "http://10.1.2.3/", "/metadata": "http://169.254.169.254/",
			"/file": "file:///etc/passwd", "/loop": "/loop", "/relative": "end", "/v6": "http://[::1]:1/", "/mapped": "http://[::ffff:127.0.0.2]/",
			"/nowhere": "", "/bad": "http://[",
		}
		if location, ok := to[r.URL.Path]; ok {
			w.Header().Set("Location", location)
			w.WriteHeader(http.StatusFound)
			return
		}
		fmt.Fprint(w, "end ", seen(r))
	})
	f := newFetcher(t)
	secrets := http.Header{"Authorization": {"Bearer a"}, "X-Token": {"b"}, "Cookie": {"c"}}
	for path, want := range map[string]string{"/here": "end Bearer abc", "/relative": "end Bearer abc", "/other": "other "} {
		if got, err := get(t.Context(), f, s.URL+path, secrets); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", path, got, err, want)
		}
	}
	for path, want := range map[string]error{
		"/private": fetch.ErrDenied, "/metadata": fetch.ErrDenied, "/file": fetch.ErrDenied, "/mapped": fetch.ErrDenied,
		"/loop": fetch.ErrFailed, "/nowhere": fetch.ErrFailed, "/bad": fetch.ErrFailed,
	} {
		if got, err := get(t.Context(), f, s.URL+path, secrets); !errors.Is(err, want) {
			t.Errorf("%s: %q, error %v, want %v", path, got, err, want)
		}
	}
}

// A name that resolves to an allowed address first and to another one then gains nothing: the address
// that is dialled counts.
func TestRebinding(t *testing.T) {
	var asked atomic.Int32
	resolver := startDNS(t, func() [4]byte {
		if asked.Add(1) == 1 {
			return [4]byte{127, 0, 0, 1}
		}
		return [4]byte{127, 0, 0, 2}
	})
	var requests atomic.Int32
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		w.Header().Set("Connection", "close")
		http.Redirect(w, r, "/again", http.StatusFound)
	})
	_, port, err := net.SplitHostPort(strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	f := newFetcher(t, func(c *fetch.Config) { c.Resolver = resolver })
	_, err = get(t.Context(), f, "http://rebind.example:"+port+"/", nil)
	if !errors.Is(err, fetch.ErrDenied) || !errors.Is(err, fetch.ErrBlocked) || !strings.Contains(err.Error(), "127.0.0.2") {
		t.Errorf("error %v, want ErrDenied for 127.0.0.2", err)
	}
	if n := requests.Load(); n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
	if _, err := get(t.Context(), f, "http://unknown.test/", nil); !errors.Is(err, fetch.ErrNotFound) {
		t.Errorf("a name that does not exist: error %v, want ErrNotFound", err)
	}
}

// startDNS serves names below example with the address that answer returns, and no other name.
func startDNS(t testing.TB, answer func() [4]byte) *net.Resolver {
	t.Helper()
	conn, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m.Response, m.Authoritative, m.Additionals = true, true, nil
			if !strings.HasSuffix(q.Name.String(), ".example.") {
				m.RCode = dnsmessage.RCodeNameError
			} else if q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class}, Body: &dnsmessage.AResource{A: answer()},
				}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(out, from) //nolint:errcheck // the client asks again
			}
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

func TestSlowAndEndlessOrigins(t *testing.T) {
	release := make(chan struct{})
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		flush := http.NewResponseController(w).Flush
		wait := func() {
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
		switch r.URL.Path {
		case "/silent":
			wait()
		case "/stalls":
			fmt.Fprint(w, "begin")
			_ = flush()
			wait()
		case "/endless":
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		case "/huge":
			w.Header().Set("Content-Length", strconv.FormatInt(1<<40, 10))
			_ = flush()
			wait()
		case "/short":
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "only this")
		case "/header":
			w.Header().Set("X-Long", strings.Repeat("x", 200<<10))
		case "/drips":
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for range 10 {
				<-tick.C
				fmt.Fprint(w, ".")
				_ = flush()
			}
		}
	})
	t.Cleanup(func() { close(release) })
	f := newFetcher(t, func(c *fetch.Config) { c.MaxBytes, c.Stall = 1<<20, 150*time.Millisecond })
	for path, want := range map[string]error{
		"/silent": fetch.ErrTimeout, "/stalls": fetch.ErrTimeout, "/endless": fetch.ErrExhausted, "/huge": fetch.ErrExhausted,
		"/short": fetch.ErrFailed, "/header": fetch.ErrFailed,
	} {
		if _, err := get(t.Context(), f, s.URL+path, nil); !errors.Is(err, want) {
			t.Errorf("%s: error %v, want %v", path, err, want)
		}
	}
	if got, err := get(t.Context(), f, s.URL+"/drips", nil); err != nil || got != ".........." {
		t.Errorf("a slow origin that moves: %q, %v", got, err)
	}
	patient := newFetcher(t)
	stop := errors.New("the test stopped it")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(50*time.Millisecond, func() { cancel(stop) })
	if _, err := get(ctx, patient, s.URL+"/stalls", nil); !errors.Is(err, stop) {
		t.Errorf("cancelled: error %v, want the cause", err)
	}
	bound, cancelBound := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancelBound()
	if _, err := get(bound, patient, s.URL+"/stalls", nil); !errors.Is(err, fetch.ErrTimeout) {
		t.Errorf("out of time: error %v, want ErrTimeout", err)
	}
	little := newFetcher(t, func(c *fetch.Config) { c.Spool = spool.NewPool(t.TempDir(), 1000) })
	if _, err := get(t.Context(), little, s.URL+"/endless", nil); !errors.Is(err, fetch.ErrExhausted) {
		t.Errorf("no room: error %v, want ErrExhausted", err)
	}
}

// The environment's proxy would see what is fetched, and could reach what is not allowed.
func TestNoProxyOfTheEnvironment(t *testing.T) {
	proxy := serve(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "from the proxy") })
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("http_proxy", proxy.URL)
	if got, err := get(t.Context(), newFetcher(t), "http://10.0.0.1/", nil); !errors.Is(err, fetch.ErrDenied) {
		t.Errorf("%q, error %v, want ErrDenied", got, err)
	}
}

func TestChecksums(t *testing.T) {
	const content = "alert('Hello, world.');"
	const (
		sha1   = "sha1-xdwiqBRZTtvYn+TLcnbCm3TFa6Q="
		sha256 = "sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng="
		sha384 = "sha384-H8BRh8j48O9oYatfu5AZzq6A9RINhZO5H16dQZngK7T62em8MUt1FLm52t+eX6xO"
		wrong  = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	)
	for text, want := range map[string]error{
		sha256: nil, sha384: nil, sha256 + " " + sha384: nil, wrong + "  " + sha384: nil, sha256 + "?opt": nil, "md5-AAAA " + sha256: nil,
		wrong: fetch.ErrChecksum, wrong + "\n" + wrong: fetch.ErrChecksum,
	} {
		sums, err := fetch.ParseChecksums(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		check := sums.Check()
		for _, part := range []string{content[:5], content[5:]} {
			if n, err := check.Write([]byte(part)); err != nil || n != len(part) {
				t.Errorf("Write: %d, %v", n, err)
			}
		}
		if err := check.Verdict(); !errors.Is(err, want) {
			t.Errorf("%q: verdict %v, want %v", text, err, want)
		}
	}
	if err := fetch.Checksums(nil).Check().Verdict(); err != nil {
		t.Errorf("no checksum: %v", err)
	}
	if _, err := fetch.ParseChecksums(sha1); err != nil {
		t.Errorf("sha1: %v", err)
	}
	for _, text := range []string{"", " ", "sha256", "sha256-", "sha256-!!!", "sha256-AAAA", "md5-AAAA", strings.Repeat(sha256+" ", 20), "sha256-" + strings.Repeat("A", 10_000)} {
		if sums, err := fetch.ParseChecksums(text); err == nil || len(err.Error()) > 300 {
			t.Errorf("%.40q: %v, error %v", text, sums, err)
		}
	}
}
