package frontend_test

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/frontend"
)

func TestHTTPZstd(t *testing.T) {
	h := start(t)
	s := h.serveHTTP(t)
	decoder := must(zstd.NewReader(nil))
	t.Cleanup(decoder.Close)
	for _, size := range []int{1, 1000, 700 << 10, 3 << 20} {
		data := bytes.Repeat([]byte("compressible "), size/13+1)[:size]
		url := s.URL + "/cas/" + h.put(t, data).Hash()
		for accept, want := range map[string]string{
			"zstd": "zstd", "gzip, zstd;q=0.5": "zstd", "gzip": "", "zstd;q=0": "", "zstd; q=0.0": "", "*": "", "": "",
		} {
			got := ask(t, http.MethodGet, url, nil, "Accept-Encoding", accept)
			wantStatus(t, accept, got, http.StatusOK)
			if e := got.header.Get("Content-Encoding"); e != want {
				t.Fatalf("Accept-Encoding %q: Content-Encoding %q, want %q", accept, e, want)
			}
			body := got.body
			if want != "" {
				var err error
				if body, err = decoder.DecodeAll(got.body, nil); err != nil {
					t.Fatal(err)
				}
				if size > 1000 && len(got.body) > size/10 {
					t.Errorf("%d bytes for %d", len(got.body), size)
				}
			}
			if !bytes.Equal(body, data) {
				t.Errorf("%d bytes, Accept-Encoding %q: other bytes", size, accept)
			}
		}
		ranged := ask(t, http.MethodGet, url, nil, "Accept-Encoding", "zstd", "Range", "bytes=0-0")
		wantStatus(t, "a range", ranged, http.StatusPartialContent)
		if ranged.header.Get("Content-Encoding") != "" || !bytes.Equal(ranged.body, data[:1]) {
			t.Errorf("a range: %v", ranged)
		}
	}
	wantStatus(t, "an absent blob", ask(t, http.MethodGet, s.URL+"/cas/"+absent().Hash(), nil, "Accept-Encoding", "zstd"), http.StatusNotFound)
}

// A damaged blob does not arrive whole in this form either.
func TestHTTPZstdDamage(t *testing.T) {
	memory := castest.NewMemory()
	h := start(t, func(c *frontend.Config) { c.Blobs = memory })
	s := h.serveHTTP(t)
	for _, size := range []int{1000, 2 << 20} {
		data := random(size)
		d := h.put(t, data)
		data[size-1]++
		memory.Corrupt(d, data)
		a, err := try(t.Context(), http.MethodGet, s.URL+"/cas/"+d.Hash(), nil, "Accept-Encoding", "zstd")
		if err == nil && a.status == http.StatusOK {
			t.Errorf("%d bytes: a whole answer", size)
		}
	}
}
