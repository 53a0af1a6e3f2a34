package run_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/jetfarm/jetfarm/cmd/run"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startHTTP serves h until stop is called, which returns what HTTP has returned.
func startHTTP(t *testing.T, grace time.Duration, h http.HandlerFunc) (address string, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l, err := run.Listen(ctx, "test", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- run.HTTP(ctx, l, h, grace) }()
	return l.Addr().String(), func() error {
		cancel()
		return <-done
	}
}

func get(t *testing.T, address string) (string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return string(data), err
}

// An open request may finish within the grace.
func TestHTTPDrains(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	address, stop := startHTTP(t, time.Minute, func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-release
		_, _ = io.WriteString(w, "finished") //nolint:errcheck // the client is the test
	})
	type answer struct {
		body string
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		body, err := get(t, address)
		answers <- answer{body, err}
	}()
	<-begun
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	select {
	case err := <-stopped:
		t.Errorf("stopped with a request open: %v", err)
	default:
	}
	close(release)
	if a := <-answers; a.err != nil || a.body != "finished" {
		t.Errorf("%q, %v", a.body, a.err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// What is left after the grace is cut off, and no handler is left running.
func TestHTTPCutsOff(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan error, 1)
	address, stop := startHTTP(t, 10*time.Millisecond, func(_ http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
		ended <- context.Cause(r.Context())
	})
	failed := make(chan error, 1)
	go func() {
		_, err := get(t, address)
		failed <- err
	}()
	<-begun
	if err := stop(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the request's context ended without a cause")
		}
	default:
		t.Error("a handler still runs after HTTP has returned")
	}
	if err := <-failed; err == nil {
		t.Error("a request that was cut off has succeeded")
	}
}

func TestHTTPRefusesLongHeaders(t *testing.T) {
	address, stop := startHTTP(t, time.Second, func(http.ResponseWriter, *http.Request) {})
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request := "GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("x", 200<<10) + "\r\n\r\n"
	if _, err := io.WriteString(conn, request); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Logf("the server stopped reading: %v", err)
	}
	answer := make([]byte, 12)
	if _, err := io.ReadFull(conn, answer); err == nil && string(answer) != "HTTP/1.1 431" {
		t.Errorf("answer %q, want 431", answer)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
