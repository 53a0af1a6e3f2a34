package frontend_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/frontend"
)

// serveHTTP serves the HTTP cache of a frontend; all other paths are the teapot's.
func (h *harness) serveHTTP(t testing.TB) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h.server.HTTP(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusTeapot)
	})))
	t.Cleanup(s.Close)
	return s
}

// answer is what came of a request.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// ask makes a request; headers are name and value in turn.
func ask(t testing.TB, method, url string, body []byte, headers ...string) answer {
	t.Helper()
	a, err := try(t.Context(), method, url, bytes.NewReader(body), headers...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return a
}

func try(ctx context.Context, method, url string, body io.Reader, headers ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return answer{}, err
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, data}, err
}

func wantStatus(t testing.TB, what string, a answer, status int, text ...string) {
	t.Helper()
	if a.status != status {
		t.Fatalf("%s: status %d %q, want %d", what, a.status, a.body, status)
	}
	for _, s := range text {
		if !strings.Contains(string(a.body), s) {
			t.Fatalf("%s: %q, want the text %q", what, a.body, s)
		}
	}
}

func TestHTTPBlobs(t *testing.T) {
	h := start(t)
	s := h.serveHTTP(t)
	for _, instance := range []string{"", "main", "a/b/c", "ac", "with space", "cas/ac"} {
		in := must(digest.SpaceOf(instance, repb.DigestFunction_SHA256, ""))
		base := s.URL + "/"
		if instance != "" {
			base += strings.ReplaceAll(instance, " ", "%20") + "/"
		}
		for _, size := range []int{0, 1, 1000, 256 << 10, 256<<10 + 1, 512 << 10, 3<<20 + 7} {
			t.Run(fmt.Sprintf("%d bytes in %q", size, instance), func(t *testing.T) {
				data := random(size)
				d := in.Of(data)
				url := base + "cas/" + d.Hash()
				if size > 0 {
					wantStatus(t, "GET before", ask(t, "GET", url, nil), 404)
					wantStatus(t, "HEAD before", ask(t, "HEAD", url, nil), 404)
					wantStatus(t, "PUT", ask(t, "PUT", url, data), 201)
				}
				wantStatus(t, "PUT again", ask(t, "PUT", url, data), 200)
				if h.missing(t, d) {
					t.Error("the gRPC service does not have it")
				}
				got := ask(t, "GET", url, nil)
				wantStatus(t, "GET", got, 200)
				if !bytes.Equal(got.body, data) {
					t.Errorf("GET: %d bytes that differ from the %d of the blob", len(got.body), size)
				}
				head := ask(t, "HEAD", url, nil)
				wantStatus(t, "HEAD", head, 200)
				if n := head.header.Get("Content-Length"); n != fmt.Sprint(size) || len(head.body) != 0 {
					t.Errorf("HEAD: Content-Length %s and %d bytes", n, len(head.body))
				}
				wantStatus(t, "GET of a version that the client has",
					ask(t, "GET", url, nil, "If-None-Match", got.header.Get("ETag")), 304)
				wantStatus(t, "GET with the function", ask(t, "GET", base+"cas/sha256/"+d.Hash(), nil), 200)
				wantStatus(t, "GET with the function in the base", ask(t, "GET", base+"sha256/cas/"+d.Hash(), nil), 200)
				if size > 0 {
					wantStatus(t, "GET in another instance", ask(t, "GET", s.URL+"/other/cas/"+d.Hash(), nil), 404)
				}
			})
		}
	}
	byGRPC := h.put(t, random(1<<20))
	wantStatus(t, "GET of what came by gRPC", ask(t, "GET", s.URL+"/cas/"+byGRPC.Hash(), nil), 200)
}

func TestHTTPRanges(t *testing.T) {
	h := start(t)
	s := h.serveHTTP(t)
	data := random(700 << 10)
	d := h.put(t, data)
	size := len(data)
	for spec, want := range map[string][2]int{ // from, to; 0, -1 is a 416
		"bytes=0-0":                   {0, 1},
		"bytes=0-":                    {0, size},
		"bytes=5-9":                   {5, 10},
		"bytes=600000-":               {600000, size},
		"bytes=-7":                    {size - 7, size},
		"bytes=-9999999":              {0, size},
		"bytes=10-99999999":           {10, size},
		"bytes=99999999-":             {0, -1},
		"bytes=-0":                    {0, -1},
		"bytes=0-0,5-6":               {},
		"bytes=9-5":                   {},
		"bytes=x-":                    {},
		"bytes=--5":                   {},
		"bytes=+1-2":                  {},
		"lines=1-2":                   {},
		"bytes=":                      {},
		"bytes=99999999999999999999-": {},
	} {
		t.Run(name(spec), func(t *testing.T) {
			got := ask(t, "GET", s.URL+"/cas/"+d.Hash(), nil, "Range", spec)
			switch {
			case want == [2]int{}:
				wantStatus(t, "no range that is known", got, 200)
				if !bytes.Equal(got.body, data) {
					t.Error("not the whole blob")
				}
			case want[1] < 0:
				wantStatus(t, "outside", got, 416)
				if r := got.header.Get("Content-Range"); r != fmt.Sprintf("bytes */%d", size) {
					t.Errorf("Content-Range %q", r)
				}
			default:
				wantStatus(t, "inside", got, 206)
				if !bytes.Equal(got.body, data[want[0]:want[1]]) {
					t.Errorf("%d bytes that differ from %d to %d", len(got.body), want[0], want[1])
				}
				if r := got.header.Get("Content-Range"); r != fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, size) {
					t.Errorf("Content-Range %q", r)
				}
			}
		})
	}
	wantStatus(t, "a range of another version", ask(t, "GET", s.URL+"/cas/"+d.Hash(), nil, "Range", "bytes=0-0", "If-Range", `"x"`), 200)
}

func TestHTTPPutRefuses(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.MaxBlobBytes = 8 << 20 })
	s := h.serveHTTP(t)
	data := random(1000)
	d := space.Of(data)
	url := s.URL + "/cas/" + d.Hash()
	wantStatus(t, "wrong bytes", ask(t, "PUT", url, random(1000)), 400, "does not match")
	wantStatus(t, "too few bytes", ask(t, "PUT", url, data[:999]), 400)
	wantStatus(t, "too many bytes", ask(t, "PUT", url, append(data, 0)), 400)
	wantStatus(t, "no bytes", ask(t, "PUT", url, nil), 400, "hash")
	wantStatus(t, "bytes under the empty hash", ask(t, "PUT", s.URL+"/cas/"+space.Of(nil).Hash(), data), 400)
	wantStatus(t, "compressed", ask(t, "PUT", url, data, "Content-Encoding", "zstd"), 415)
	wantStatus(t, "short hash", ask(t, "PUT", s.URL+"/cas/abc", data), 400, "hash")
	wantStatus(t, "POST", ask(t, "POST", url, data), 405)
	wantStatus(t, "DELETE", ask(t, "DELETE", url, nil), 405)
	large := random(8<<20 + 1)
	wantStatus(t, "too large", ask(t, "PUT", s.URL+"/cas/"+space.Of(large).Hash(), large, "Expect", "100-continue"), 413, "8388608")
	// A reader of unknown kind makes the client send chunks.
	a, err := try(t.Context(), "PUT", url, struct{ io.Reader }{bytes.NewReader(data)})
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, "chunks", a, 411, "Content-Length")
	if !h.missing(t, d) {
		t.Error("something that was refused is there")
	}
}

// Nothing in a path leads anywhere but to a blob.
func TestHTTPPaths(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Instances = frontend.Instances{"", "main", "a/b"} })
	s := h.serveHTTP(t)
	d := h.put(t, []byte("in the path"))
	hash := d.Hash()
	address := strings.TrimPrefix(s.URL, "http://")
	for target, want := range map[string]int{
		"/cas/" + hash:                                  200,
		"http://" + address + "/cas/" + hash:            200,
		"http://evil.example/cas/" + hash:               200, // the host does not matter
		"/main/cas/" + hash:                             404,
		"/a/b/cas/" + hash:                              404,
		"/m%61in/cas/" + hash:                           404,
		"/c%61s/" + hash:                                418,
		"/secret/cas/" + hash:                           400, // an instance that is not served
		"//cas/" + hash:                                 400,
		"/../cas/" + hash:                               400,
		"/./cas/" + hash:                                400,
		"/main/../cas/" + hash:                          400,
		"/main/%2e%2e/cas/" + hash:                      400,
		"/main%2F..%2F/cas/" + hash:                     400,
		"/a%2Fb/cas/" + hash:                            400,
		"/a//b/cas/" + hash:                             400,
		"//evil.example/cas/" + hash:                    400,
		"/%00/cas/" + hash:                              400,
		"/%ff/cas/" + hash:                              400,
		"/blobs/cas/" + hash:                            400,
		"/" + strings.Repeat("x", 300) + "/cas/" + hash: 400,
		"/cas/" + strings.ToUpper(hash):                 400,
		"/cas/" + hash + "0":                            400,
		"/cas/" + hash[1:]:                              400,
		"/cas/":                                         400,
		"/cas/..":                                       400,
		"/cas/" + strings.Repeat("g", 64):               400,
		"/cas/%2e%2e%2fetc%2fpasswd":                    400,
		"/cas":                                          418,
		"/cas/" + hash + "/":                            418,
		"/cas/x/" + hash:                                418,
		"/cas/../cas/" + hash:                           400,
		"/cas/" + hash + "?x=/../":                      200,
		"/":                                             418,
		"/metrics":                                      418,
		"*":                                             418,
	} {
		t.Run(name(target), func(t *testing.T) {
			resp := raw(t, address, "GET "+target+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			defer resp.Body.Close()
			if resp.StatusCode != want || resp.Header.Get("Location") != "" {
				t.Errorf("status %d, Location %q, want %d", resp.StatusCode, resp.Header.Get("Location"), want)
			}
		})
	}
}

// raw sends bytes and reads an answer.
func raw(t testing.TB, address, request string) *http.Response {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := conn.Write([]byte(request)); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("no answer to %q: %v", request, err)
	}
	return resp
}

func TestHTTPActions(t *testing.T) {
	h := start(t, allowUpdates)
	s := h.serveHTTP(t)
	action, result := h.action(t), h.result(t)
	url := s.URL + "/ac/" + action.Hash()
	data := encode(result)
	wantStatus(t, "GET before", ask(t, "GET", url, nil), 404)
	wantStatus(t, "PUT", ask(t, "PUT", url, data), 201)
	for _, method := range []string{"GET", "HEAD"} {
		got := ask(t, method, url, nil)
		wantStatus(t, method, got, 200)
		if method == "GET" && !proto.Equal(result, decode(t, got.body)) {
			t.Errorf("GET: %v, want %v", decode(t, got.body), result)
		}
		if n := got.header.Get("Content-Length"); n != fmt.Sprint(proto.Size(result)) {
			t.Errorf("%s: Content-Length %s", method, n)
		}
	}
	byGRPC, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
	if err != nil || !proto.Equal(byGRPC, result) {
		t.Errorf("GetActionResult: %v, %v", byGRPC, err)
	}
	wantStatus(t, "GET in another instance", ask(t, "GET", s.URL+"/other/ac/"+action.Hash(), nil), 404)
	wantStatus(t, "no ActionResult", ask(t, "PUT", url, []byte("text")), 400, "ActionResult")
	wantStatus(t, "a result whose action is absent", ask(t, "PUT", s.URL+"/ac/"+absent().Hash(), data), 412, "not in the CAS")
	wantStatus(t, "too large", ask(t, "PUT", url, random(4<<20), "Expect", "100-continue"), 413)
	bad := proto.CloneOf(result)
	bad.OutputFiles[0].Path = "/etc/passwd"
	wantStatus(t, "an absolute path", ask(t, "PUT", url, encode(bad)), 400, "/etc/passwd")
	bad = proto.CloneOf(result)
	bad.OutputFiles[0].Digest = absent().Proto()
	wantStatus(t, "an absent output", ask(t, "PUT", url, encode(bad)), 412)
	wantStatus(t, "GET after", ask(t, "GET", url, nil), 200)
}

func decode(t testing.TB, data []byte) *repb.ActionResult {
	t.Helper()
	result := new(repb.ActionResult)
	if err := proto.Unmarshal(data, result); err != nil {
		t.Fatal(err)
	}
	return result
}

// A result is a hit only while all its blobs are there, and while its action is.
func TestHTTPActionsAreComplete(t *testing.T) {
	h := start(t, allowUpdates)
	s := h.serveHTTP(t)
	store, ok := h.blobs.(*objectstore.Store)
	if !ok {
		t.Fatalf("the store is a %T", h.blobs)
	}
	remove := map[string]func(action digest.Digest, result *repb.ActionResult) *repb.Digest{
		"output": func(_ digest.Digest, result *repb.ActionResult) *repb.Digest {
			return result.GetOutputFiles()[1].GetDigest()
		},
		"stdout": func(_ digest.Digest, result *repb.ActionResult) *repb.Digest { return result.GetStdoutDigest() },
		"action": func(action digest.Digest, _ *repb.ActionResult) *repb.Digest { return action.Proto() },
	}
	for what, of := range remove {
		action, result := h.action(t), h.result(t)
		url := s.URL + "/ac/" + action.Hash()
		wantStatus(t, "PUT", ask(t, "PUT", url, encode(result)), 201)
		wantStatus(t, "GET", ask(t, "GET", url, nil), 200)
		if err := store.Remove(t.Context(), must(space.Parse(of(action, result)))); err != nil {
			t.Fatal(err)
		}
		wantStatus(t, "GET without its "+what, ask(t, "GET", url, nil), 404)
		wantStatus(t, "PUT without its "+what, ask(t, "PUT", url, encode(result)), 412)
	}
}

// ccache keeps values of its own under keys that are the digest of nothing.
func TestHTTPOpaqueResults(t *testing.T) {
	h := start(t, allowUpdates, func(c *frontend.Config) { c.OpaqueResults = true })
	s := h.serveHTTP(t)
	key, value := absent().Hash(), random(100_000)
	url := s.URL + "/ac/" + key
	wantStatus(t, "GET before", ask(t, "GET", url, nil), 404)
	for _, value := range [][]byte{value, []byte("another"), {}} {
		wantStatus(t, "PUT", ask(t, "PUT", url, value), 201)
		got := ask(t, "GET", url, nil)
		wantStatus(t, "GET", got, 200)
		if !bytes.Equal(got.body, value) {
			t.Errorf("GET returned %d other bytes, want %d", len(got.body), len(value))
		}
	}
	wantStatus(t, "HEAD", ask(t, "HEAD", url, nil), 200)
	wantStatus(t, "GET in another instance", ask(t, "GET", s.URL+"/other/ac/"+key, nil), 404)
	wantStatus(t, "too large", ask(t, "PUT", url, random(4<<20), "Expect", "100-continue"), 413)
	action, result := h.action(t), h.result(t)
	wantStatus(t, "PUT of a result", ask(t, "PUT", s.URL+"/ac/"+action.Hash(), encode(result)), 201)
	byGRPC, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
	if err != nil || !proto.Equal(byGRPC, result) {
		t.Errorf("GetActionResult: %v, %v", byGRPC, err)
	}
	h2 := start(t, func(c *frontend.Config) { c.OpaqueResults = true })
	wantStatus(t, "PUT where clients may not write", ask(t, "PUT", h2.serveHTTP(t).URL+"/ac/"+key, value), 403)
}

func TestHTTPActionsAreReadOnlyByDefault(t *testing.T) {
	h := start(t)
	s := h.serveHTTP(t)
	action, result := h.action(t), h.result(t)
	url := s.URL + "/ac/" + action.Hash()
	wantStatus(t, "PUT", ask(t, "PUT", url, encode(result)), 403, "--action-cache-updates")
	h.cache(t, action, result)
	wantStatus(t, "GET of what a worker has stored", ask(t, "GET", url, nil), 200)
}
