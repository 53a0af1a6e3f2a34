package frontend_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// A damaged blob does not arrive whole: the client sees an error or a body that is too short.
func TestHTTPDamage(t *testing.T) {
	memory := castest.NewMemory()
	h := start(t, func(c *frontend.Config) { c.Blobs = memory })
	s := h.serveHTTP(t)
	for _, size := range []int{1000, 256 << 10, 1 << 20} {
		for what, damaged := range map[string]func(data []byte) []byte{
			"short":          func(data []byte) []byte { return data[:size/2] },
			"long":           func(data []byte) []byte { return append(data, 0) },
			"other byte":     func(data []byte) []byte { data[size/2]++; return data },
			"other last one": func(data []byte) []byte { data[size-1]++; return data },
		} {
			data := random(size)
			d := h.put(t, data)
			memory.Corrupt(d, damaged(data))
			a, err := try(t.Context(), "GET", s.URL+"/cas/"+d.Hash(), nil)
			if err == nil && a.status == 200 {
				t.Errorf("%d bytes, %s: a whole answer", size, what)
			}
		}
	}
}

// requests is how many requests of the HTTP cache have ended.
func (h *harness) requests(t testing.TB) (n uint64) {
	t.Helper()
	for _, family := range must(h.metrics.Gather()) {
		if family.GetName() == "jetfarm_frontend_http_duration_seconds" {
			for _, m := range family.GetMetric() {
				n += m.GetHistogram().GetSampleCount()
			}
		}
	}
	return n
}

func TestHTTPStalls(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.Stall = 200 * time.Millisecond })
	s := h.serveHTTP(t)
	address := strings.TrimPrefix(s.URL, "http://")
	ended := func(n uint64) {
		t.Helper()
		eventually(t, "the request ends", func() bool {
			return handlers() == 0 && h.requests(t) >= n
		})
	}
	t.Run("a client that sends nothing", func(t *testing.T) {
		resp := raw(t, address, "PUT /cas/"+absent().Hash()+" HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nbegin")
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusRequestTimeout {
			t.Errorf("status %d, want 408", resp.StatusCode)
		}
		ended(1)
	})
	t.Run("a client that reads nothing", func(t *testing.T) {
		d := h.put(t, random(64<<20))
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /cas/%s HTTP/1.1\r\nHost: x\r\n\r\n", d.Hash())
		ended(2)
	})
	t.Run("a client that is slow and moves", func(t *testing.T) {
		data := random(10)
		a, err := try(t.Context(), "PUT", s.URL+"/cas/"+space.Of(data).Hash(), nil)
		if err != nil || a.status != 400 {
			t.Fatalf("%v, %v", a, err)
		}
		req := must(http.NewRequestWithContext(t.Context(), http.MethodPut, s.URL+"/cas/"+space.Of(data).Hash(), &drip{data: data, every: 50 * time.Millisecond}))
		req.ContentLength = int64(len(data))
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusCreated {
			t.Errorf("status %d, want 201", resp.StatusCode)
		}
	})
}

// drip is a reader of one byte at a time.
type drip struct {
	data  []byte
	every time.Duration
}

func (d *drip) Read(p []byte) (int, error) {
	if len(d.data) == 0 {
		return 0, io.EOF
	}
	timer := time.NewTimer(d.every)
	<-timer.C
	n := copy(p[:1], d.data)
	d.data = d.data[n:]
	return n, nil
}

// A client that leaves in the middle of an upload leaves nothing.
func TestHTTPClientLeaves(t *testing.T) {
	h := start(t)
	s := h.serveHTTP(t)
	data := random(2 << 20)
	d := space.Of(data)
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "PUT /cas/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", d.Hash(), len(data))
	if _, err := conn.Write(data[:1<<20]); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the request ends", func() bool { return handlers() == 0 })
	if !h.missing(t, d) {
		t.Error("half a blob is present")
	}
	wantStatus(t, "PUT of all", ask(t, "PUT", s.URL+"/cas/"+d.Hash(), data), 201)
}

// A handler that panics answers with an error, and the next request is served.
func TestHTTPPanic(t *testing.T) {
	memory := castest.NewMemory()
	h := start(t, func(c *frontend.Config) {
		c.Blobs = panicking{memory}
		c.Registerer = nil
	})
	s := h.serveHTTP(t)
	d := space.Of([]byte("x"))
	wantStatus(t, "GET", ask(t, "GET", s.URL+"/cas/"+d.Hash(), nil), 500, "internal error")
	wantStatus(t, "GET of the empty blob", ask(t, "GET", s.URL+"/cas/"+space.Of(nil).Hash(), nil), 200)
}

type panicking struct{ *castest.Memory }

func (panicking) Size(context.Context, digest.Space, string) (int64, error) { panic("a test") }
