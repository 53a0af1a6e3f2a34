package frontend_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	remoteasset "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/asset"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/frontend"
)

// assetRig is a frontend with assets, and an origin on this machine.
type assetRig struct {
	*harness
	fetch  remoteasset.FetchClient
	push   remoteasset.PushClient
	origin *origin
}

// origin is a server whose paths have contents, and which counts requests.
type origin struct {
	*httptest.Server
	mu       sync.Mutex // guards paths
	paths    map[string][]byte
	requests atomic.Int32
	// handler goes before the paths when it is set.
	handler atomic.Pointer[http.HandlerFunc]
}

func (o *origin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.requests.Add(1)
	if h := o.handler.Load(); h != nil {
		(*h)(w, r)
		return
	}
	o.mu.Lock()
	data, ok := o.paths[r.URL.Path]
	o.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_, _ = w.Write(data) //nolint:errcheck // the client may leave
}

func (o *origin) set(path string, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.paths[path] = data
}

func (o *origin) handle(h http.HandlerFunc) { o.handler.Store(&h) }

func startAssets(t testing.TB, changes ...func(*frontend.Config)) *assetRig {
	t.Helper()
	o := &origin{paths: make(map[string][]byte)}
	o.Server = httptest.NewServer(o)
	t.Cleanup(o.Close)
	var names *asset.Names
	changes = append([]func(*frontend.Config){func(c *frontend.Config) {
		c.Assets = &frontend.Assets{Names: names, Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, SpoolDir: t.TempDir()}
		c.AllowActionCacheUpdates = true
	}}, changes...)
	farm := brokertest.Start(t)
	names = must(asset.Open(t.Context(), asset.Config{Conn: farm.Connect(t), Log: slog.New(slog.DiscardHandler)}))
	h := startOn(t, farm, changes...)
	return &assetRig{harness: h, fetch: remoteasset.NewFetchClient(h.conn), push: remoteasset.NewPushClient(h.conn), origin: o}
}

func qualifiers(nameValue ...string) (qs []*remoteasset.Qualifier) {
	for i := 0; i+1 < len(nameValue); i += 2 {
		qs = append(qs, &remoteasset.Qualifier{Name: nameValue[i], Value: nameValue[i+1]})
	}
	return qs
}

func sri(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// blob fetches a file and returns the response, whose status must have the code.
func (r *assetRig) blob(t testing.TB, code codes.Code, req *remoteasset.FetchBlobRequest) *remoteasset.FetchBlobResponse {
	t.Helper()
	resp, err := r.fetch.FetchBlob(t.Context(), req)
	if err != nil {
		t.Fatalf("FetchBlob: %v", err)
	}
	wantInline(t, resp.GetStatus(), code)
	return resp
}

func wantInline(t testing.TB, s *statuspb.Status, code codes.Code) {
	t.Helper()
	if codes.Code(s.GetCode()) != code {
		t.Fatalf("status in the response %v, want %v", s, code)
	}
}

func (r *assetRig) wantBlob(t testing.TB, d *repb.Digest, want []byte) {
	t.Helper()
	data, err := cas.ReadAll(t.Context(), r.blobs, must(space.Parse(d)), 1<<30)
	if err != nil || !bytes.Equal(data, want) {
		t.Fatalf("blob %v: %d bytes, %v, want %d", d, len(data), err, len(want))
	}
}

func TestFetchBlob(t *testing.T) {
	r := startAssets(t)
	for _, size := range []int{0, 1000, 3 << 20} {
		data := random(size)
		path := fmt.Sprintf("/%d", size)
		r.origin.set(path, data)
		t.Run(fmt.Sprintf("AST-7 %d bytes", size), func(t *testing.T) {
			resp := r.blob(t, codes.OK, &remoteasset.FetchBlobRequest{Uris: []string{r.origin.URL + path}, Qualifiers: qualifiers("checksum.sri", sri(data))})
			r.wantBlob(t, resp.GetBlobDigest(), data)
			if resp.GetUri() != r.origin.URL+path || resp.GetDigestFunction() != repb.DigestFunction_SHA256 {
				t.Errorf("uri %q, function %v", resp.GetUri(), resp.GetDigestFunction())
			}
		})
	}
	before := r.origin.requests.Load()
	r.blob(t, codes.OK, &remoteasset.FetchBlobRequest{Uris: []string{r.origin.URL + "/1000"}, Qualifiers: qualifiers("checksum.sri", sri(nil))})
	data := random(100)
	r.put(t, data)
	resp := r.blob(t, codes.OK, &remoteasset.FetchBlobRequest{Uris: []string{"http://10.0.0.1/anywhere"}, Qualifiers: qualifiers("checksum.sri", sri(data))})
	r.wantBlob(t, resp.GetBlobDigest(), data)
	if n := r.origin.requests.Load() - before; n != 0 {
		t.Errorf("%d requests for what is in the CAS", n)
	}
	t.Run("AST-7 another function", func(t *testing.T) {
		data := random(1000)
		r.origin.set("/other", data)
		resp := r.blob(t, codes.OK, &remoteasset.FetchBlobRequest{
			InstanceName: "a/b", Uris: []string{r.origin.URL + "/other"}, DigestFunction: repb.DigestFunction_SHA512,
		})
		sum := sha512.Sum512(data)
		if want := fmt.Sprintf("%x", sum); resp.GetBlobDigest().GetHash() != want || resp.GetDigestFunction() != repb.DigestFunction_SHA512 {
			t.Errorf("%v", resp)
		}
	})
}

func TestFetchBlobRefuses(t *testing.T) {
	r := startAssets(t)
	uri := r.origin.URL + "/x"
	r.origin.set("/x", []byte("x"))
	for name, req := range map[string]*remoteasset.FetchBlobRequest{
		"AST-1 no URI":              {},
		"AST-1 empty URI":           {Uris: []string{""}},
		"AST-1 many URIs":           {Uris: strings.Split(strings.Repeat("a,", 200), ",")},
		"AST-1 long URI":            {Uris: []string{"http://" + strings.Repeat("x", 20_000)}},
		"AST-1 same qualifier":      {Uris: []string{uri}, Qualifiers: qualifiers("bazel.canonical_id", "1", "bazel.canonical_id", "2")},
		"AST-1 no qualifier name":   {Uris: []string{uri}, Qualifiers: qualifiers("", "1")},
		"AST-2 git":                 {Uris: []string{uri}, Qualifiers: qualifiers("vcs.commit", "1")},
		"AST-2 directory of a blob": {Uris: []string{uri}, Qualifiers: qualifiers("directory", "a")},
		"checksum":                  {Uris: []string{uri}, Qualifiers: qualifiers("checksum.sri", "nonsense")},
		"checksum of no function":   {Uris: []string{uri}, Qualifiers: qualifiers("checksum.sri", "md5-AAAA")},
		"auth headers":              {Uris: []string{uri}, Qualifiers: qualifiers("bazel.auth_headers", "[]")},
		"header name":               {Uris: []string{uri}, Qualifiers: qualifiers("http_header:a b", "x")},
		"header value":              {Uris: []string{uri}, Qualifiers: qualifiers("http_header:A", "x\r\nHost: y")},
		"header of the connection":  {Uris: []string{uri}, Qualifiers: qualifiers("http_header:transfer-encoding", "chunked")},
		"header of no URI":          {Uris: []string{uri}, Qualifiers: qualifiers("http_header_url:1:A", "x")},
		"timeout":                   {Uris: []string{uri}, Timeout: durationpb.New(-time.Second)},
		"oldest":                    {Uris: []string{uri}, OldestContentAccepted: &timestamppb.Timestamp{Nanos: -1}},
		"function":                  {Uris: []string{uri}, DigestFunction: repb.DigestFunction_MD5},
		"instance":                  {Uris: []string{uri}, InstanceName: "a//b"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.fetch.FetchBlob(t.Context(), req)
			wantCode(t, "FetchBlob", err, codes.InvalidArgument)
		})
	}
	_, err := r.fetch.FetchBlob(t.Context(), &remoteasset.FetchBlobRequest{Uris: []string{uri}, Qualifiers: qualifiers("x", "1", "vcs.branch", "2")})
	wantCode(t, "FetchBlob", err, codes.InvalidArgument)
	var described []string
	for _, detail := range status.Convert(err).Details() {
		for _, v := range detail.(*errdetails.BadRequest).GetFieldViolations() {
			described = append(described, v.GetField()+" "+v.GetDescription())
		}
	}
	if got := strings.Join(described, ", "); got != `qualifiers.name "x" not supported, qualifiers.name "vcs.branch" not supported` {
		t.Errorf("details %s", got)
	}
	if n := r.origin.requests.Load(); n != 0 {
		t.Errorf("%d requests for what was refused", n)
	}
}

func TestFetchBlobOriginFails(t *testing.T) {
	r := startAssets(t, func(c *frontend.Config) { c.Assets.MaxBytes, c.Assets.Stall = 1<<20, 300*time.Millisecond })
	r.origin.set("/ok", []byte("content"))
	r.origin.set("/large", random(1<<20+1))
	good, bad := r.origin.URL+"/ok", r.origin.URL+"/none"
	one := func(uris ...string) *remoteasset.FetchBlobRequest { return &remoteasset.FetchBlobRequest{Uris: uris} }
	for name, test := range map[string]struct {
		req  *remoteasset.FetchBlobRequest
		code codes.Code
		uri  string
	}{
		"AST-3 wrong checksum": {&remoteasset.FetchBlobRequest{Uris: []string{good}, Qualifiers: qualifiers("checksum.sri", sri([]byte("y")))}, codes.Aborted, good},
		"AST-4 not found":      {one(bad), codes.NotFound, bad},
		"AST-4 no origin":      {one("urn:uuid:1"), codes.NotFound, "urn:uuid:1"},
		"AST-4 too large":      {one(r.origin.URL + "/large"), codes.ResourceExhausted, r.origin.URL + "/large"},
		"AST-11 metadata":      {one("http://169.254.169.254/"), codes.PermissionDenied, "http://169.254.169.254/"},
		"AST-11 private":       {one("http://10.0.0.1/"), codes.PermissionDenied, "http://10.0.0.1/"},
		"X-163 file":           {one("file:///etc/passwd"), codes.PermissionDenied, "file:///etc/passwd"},
		"X-163 IPv6 loopback":  {one("http://[::1]:80/"), codes.PermissionDenied, "http://[::1]:80/"},
		"the second has it":    {one(bad, good), codes.OK, good},
		"what counts is first": {one(bad, "http://10.0.0.1/", bad), codes.PermissionDenied, "http://10.0.0.1/"},
	} {
		t.Run(name, func(t *testing.T) {
			resp := r.blob(t, test.code, test.req)
			if resp.GetUri() != test.uri {
				t.Errorf("uri %q, want %q", resp.GetUri(), test.uri)
			}
			if (resp.GetBlobDigest() != nil) != (test.code == codes.OK) {
				t.Errorf("digest %v", resp.GetBlobDigest())
			}
		})
	}
	t.Run("AST-3 one of several checksums", func(t *testing.T) {
		r.blob(t, codes.OK, &remoteasset.FetchBlobRequest{Uris: []string{good}, Qualifiers: qualifiers("checksum.sri", sri([]byte("y"))+" "+sri([]byte("content")))})
	})
	t.Run("AST-4 silence", func(t *testing.T) {
		r.origin.handle(func(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() })
		r.blob(t, codes.DeadlineExceeded, one(r.origin.URL+"/silent"))
		r.blob(t, codes.DeadlineExceeded, &remoteasset.FetchBlobRequest{Uris: []string{good + "?new"}, Timeout: durationpb.New(50 * time.Millisecond)})
	})
	t.Run("X-163 endless", func(t *testing.T) {
		r.origin.handle(func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		})
		r.blob(t, codes.ResourceExhausted, one(r.origin.URL+"/endless"))
	})
	t.Run("X-163 redirect to metadata", func(t *testing.T) {
		r.origin.handle(func(w http.ResponseWriter, req *http.Request) {
			http.Redirect(w, req, "http://169.254.169.254/latest", http.StatusFound)
		})
		r.blob(t, codes.PermissionDenied, one(r.origin.URL+"/redirect"))
	})
}

// Rows AST-5 and AST-6: what was fetched is found again while it is there and young enough.
func TestFetchBlobAgain(t *testing.T) {
	memory := castest.NewMemory()
	r := startAssets(t, func(c *frontend.Config) { c.Blobs = memory })
	uri := r.origin.URL + "/x"
	first := []byte("first")
	r.origin.set("/x", first)
	ask := func(change ...func(*remoteasset.FetchBlobRequest)) []byte {
		t.Helper()
		req := &remoteasset.FetchBlobRequest{Uris: []string{uri}}
		for _, f := range change {
			f(req)
		}
		resp := r.blob(t, codes.OK, req)
		return must(cas.ReadAll(t.Context(), memory, must(space.Parse(resp.GetBlobDigest())), 100))
	}
	ask()
	r.origin.set("/x", []byte("second"))
	t.Run("AST-6 content of any age", func(t *testing.T) {
		if got := ask(); string(got) != "first" || r.origin.requests.Load() != 1 {
			t.Errorf("%q after %d requests", got, r.origin.requests.Load())
		}
	})
	t.Run("AST-6 no older than now", func(t *testing.T) {
		now := timestamppb.Now()
		if got := ask(func(req *remoteasset.FetchBlobRequest) { req.OldestContentAccepted = now }); string(got) != "second" {
			t.Errorf("%q", got)
		}
		before := r.origin.requests.Load()
		if got := ask(func(req *remoteasset.FetchBlobRequest) { req.OldestContentAccepted = now }); string(got) != "second" || r.origin.requests.Load() != before {
			t.Errorf("again: %q after %d more requests", got, r.origin.requests.Load()-before)
		}
	})
	t.Run("AST-5 evicted", func(t *testing.T) {
		memory.Remove(space.Of([]byte("second")))
		if got := ask(); string(got) != "second" {
			t.Errorf("%q", got)
		}
	})
	t.Run("another canonical id", func(t *testing.T) {
		r.origin.set("/x", []byte("third"))
		if got := ask(func(req *remoteasset.FetchBlobRequest) { req.Qualifiers = qualifiers("bazel.canonical_id", "3") }); string(got) != "third" {
			t.Errorf("%q", got)
		}
	})
	t.Run("other credentials", func(t *testing.T) {
		r.origin.set("/x", []byte("fourth"))
		if got := ask(func(req *remoteasset.FetchBlobRequest) {
			req.Qualifiers = qualifiers("http_header:Authorization", "me")
		}); string(got) != "fourth" {
			t.Errorf("%q", got)
		}
	})
}

func TestAST_10_BazelsQualifiers(t *testing.T) {
	r := startAssets(t)
	a, b := r.origin.URL+"/a", r.origin.URL+"/b"
	r.origin.handle(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/a" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		fmt.Fprintf(w, "%s|%s|%s", req.Header.Get("Authorization"), req.Header.Get("X-All"), req.Header.Get("X-One"))
	})
	for name, test := range map[string]struct {
		qualifiers []*remoteasset.Qualifier
		want       string
	}{
		"AST-10 auth headers":         {qualifiers("bazel.auth_headers", `{"`+b+`":{"Authorization":"Basic x"},"`+a+`":{"X-One":"no"}}`), "Basic x||"},
		"AST-10 lists of headers":     {qualifiers("bazel.auth_headers", `{"`+b+`":{"Authorization":["Basic y"]}}`), "Basic y||"},
		"AST-10 header":               {qualifiers("http_header:X-All", "all"), "|all|"},
		"AST-10 header of one":        {qualifiers("http_header_url:1:X-One", "one", "http_header_url:0:X-All", "no"), "||one"},
		"AST-10 header of one wins":   {qualifiers("http_header_url:1:X-All", "mine", "http_header:X-All", "all"), "|mine|"},
		"AST-10 canonical id":         {qualifiers("bazel.canonical_id", a+" "+b), "||"},
		"AST-10 canonical and header": {qualifiers("bazel.canonical_id", "", "http_header:X-All", "v"), "|v|"},
	} {
		t.Run(name, func(t *testing.T) {
			resp := r.blob(t, codes.OK, &remoteasset.FetchBlobRequest{Uris: []string{a, b}, Qualifiers: test.qualifiers})
			r.wantBlob(t, resp.GetBlobDigest(), []byte(test.want))
		})
	}
}

// Row AST-8 and what the farm promises of shared downloads: they outlive their first caller and end
// with their last.
func TestFetchIsShared(t *testing.T) {
	r := startAssets(t)
	begun, release := make(chan struct{}, 10), make(chan struct{})
	gone := make(chan struct{}, 10)
	r.origin.handle(func(w http.ResponseWriter, req *http.Request) {
		begun <- struct{}{}
		select {
		case <-release:
			fmt.Fprint(w, "content of ", req.URL.Path)
		case <-req.Context().Done():
			gone <- struct{}{}
		}
	})
	ask := func(ctx context.Context, path string) <-chan error {
		done := make(chan error, 1)
		go func() {
			resp, err := r.fetch.FetchBlob(ctx, &remoteasset.FetchBlobRequest{Uris: []string{r.origin.URL + path}})
			if err == nil && resp.GetStatus().GetCode() != 0 {
				err = errors.New(resp.GetStatus().GetMessage())
			}
			done <- err
		}()
		return done
	}
	t.Run("the last one ends it", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := ask(ctx, "/ended")
		<-begun
		cancel()
		wantCode(t, "FetchBlob", <-done, codes.Canceled)
		<-gone
		eventually(t, "the call ends", func() bool { return handlers() == 0 })
	})
	t.Run("the first one leaves", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		first := ask(ctx, "/shared")
		<-begun
		others := make([]<-chan error, 5)
		for i := range others {
			others[i] = ask(t.Context(), "/shared")
		}
		eventually(t, "all have joined", func() bool { return handlers() >= 6 })
		cancel()
		wantCode(t, "the first", <-first, codes.Canceled)
		close(release)
		for _, other := range others {
			if err := <-other; err != nil {
				t.Errorf("another: %v", err)
			}
		}
		if n := r.origin.requests.Load(); n != 2 {
			t.Errorf("%d requests, want one for each path", n)
		}
	})
	t.Run("AST-8 out of time", func(t *testing.T) {
		release = make(chan struct{})
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		first := ask(ctx, "/later")
		<-begun
		wantCode(t, "the first", <-first, codes.DeadlineExceeded)
		close(release)
		eventually(t, "the download ends", func() bool { return handlers() == 0 })
		before := r.origin.requests.Load()
		if err := <-ask(t.Context(), "/later"); err != nil {
			t.Error(err)
		}
		if n := r.origin.requests.Load() - before; n != 0 {
			t.Errorf("%d requests for what was downloaded in the meantime", n)
		}
	})
}

// A shutdown does not wait for slow origins.
func TestFetchEndsWithTheServer(t *testing.T) {
	r := startAssets(t)
	begun := make(chan struct{})
	r.origin.handle(func(_ http.ResponseWriter, req *http.Request) {
		close(begun)
		<-req.Context().Done()
	})
	done := make(chan error, 1)
	go func() {
		_, err := r.fetch.FetchBlob(t.Context(), &remoteasset.FetchBlobRequest{Uris: []string{r.origin.URL + "/x"}})
		done <- err
	}()
	<-begun
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.server.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	wantCode(t, "FetchBlob", <-done, codes.Unavailable)
}
