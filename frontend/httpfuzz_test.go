package frontend_test

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/frontend"
)

// Whatever a path is, it is refused, missed or another handler's, and leads nowhere else.
func FuzzHTTPPath(f *testing.F) {
	hash := space.Of([]byte("x")).Hash()
	for _, path := range []string{
		"/cas/" + hash, "/ac/" + hash, "/a/b/cas/" + hash, "/cas/blake3/" + hash, "/blake3/cas/" + hash, "//cas/" + hash, "/../cas/" + hash,
		"/a%2fb/cas/" + hash, "/cas", "/", "*", "/%00/ac/" + hash, "/sha256/sha256/cas/sha256/" + hash,
	} {
		f.Add(path)
	}
	server := frontend.New(frontend.Config{Blobs: castest.NewMemory(), Log: slog.New(slog.DiscardHandler)})
	f.Cleanup(server.GRPC().Stop)
	handler := server.HTTP(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	f.Fuzz(func(t *testing.T, path string) {
		u, err := url.ParseRequestURI(path)
		if err != nil {
			return
		}
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, &http.Request{Method: method, URL: u, Header: http.Header{}, Body: http.NoBody})
			switch w.Code {
			case http.StatusBadRequest, http.StatusNotFound, http.StatusTeapot:
			default:
				if !strings.Contains(path, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855") {
					t.Errorf("%s %q: status %d", method, path, w.Code)
				}
			}
			if w.Header().Get("Location") != "" {
				t.Errorf("%q leads to %q", path, w.Header().Get("Location"))
			}
		}
	})
}
