package app_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cmd/app"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// finding is a line of the doctor's report.
type finding struct{ Check, Status, Text, Fix string }

// doctor examines and returns the findings by check, the worst of each.
func doctor(t *testing.T, args ...string) (findings map[string]finding, err error) {
	t.Helper()
	var out bytes.Buffer
	err = app.Run(t.Context(), append([]string{"doctor", "--json"}, args...), &out, io.Discard)
	var report struct {
		Findings []finding
		Failed   int
	}
	if e := json.Unmarshal(out.Bytes(), &report); e != nil {
		t.Fatalf("doctor %v printed %q: %v (error %v)", args, out.String(), e, err)
	}
	findings = make(map[string]finding)
	failed := 0
	for _, f := range report.Findings {
		if old, ok := findings[f.Check]; !ok || old.Status == "ok" || f.Status == "fail" {
			findings[f.Check] = f
		}
		if f.Status == "fail" {
			failed++
		}
		if (f.Status == "ok") != (f.Fix == "") && !strings.HasPrefix(f.Check, "isolation ") {
			t.Errorf("%+v: a fix belongs to what is not ok", f)
		}
	}
	if failed != report.Failed || (failed > 0) != (err != nil) {
		t.Errorf("%d failures, %d reported, error %v", failed, report.Failed, err)
	}
	return findings, err
}

// wantFinding checks one finding, and that a failure is the last thing that is said where others
// would depend on it.
func wantFinding(t *testing.T, findings map[string]finding, status, check, text string) {
	t.Helper()
	if f := findings[check]; f.Status != status || !strings.Contains(f.Text, text) {
		t.Errorf("%s is %+v, want %s and %q; all: %+v", check, f, status, text, findings)
	}
}

// wholeFarm has all that a farm has on its broker.
func wholeFarm(t *testing.T) *brokertest.Farm {
	t.Helper()
	farm := brokertest.Start(t)
	farm.Client(t)
	nc := farm.Connect(t)
	log := slog.New(slog.DiscardHandler)
	store, err := objectstore.Open(t.Context(), objectstore.Config{Small: nc, Bulk: nc, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := actioncache.Open(t.Context(), actioncache.Config{Conn: nc, Blobs: store, Log: log}); err != nil {
		t.Fatal(err)
	}
	return farm
}

func streamsOf(t *testing.T, farm *brokertest.Farm) jetstream.JetStream { //nolint:ireturn // the library has no type for it
	t.Helper()
	js, err := jetstream.New(farm.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func TestDoctorOfAFarm(t *testing.T) {
	farm := wholeFarm(t)
	findings, err := doctor(t, "--nats", farm.URL())
	if err != nil {
		t.Errorf("a farm in good health: %v, %+v", err, findings)
	}
	for _, check := range []string{"address", "nats", "max_payload", "jetstream", "streams", "clock", "configuration", "index", "storage", "action cache"} {
		wantFinding(t, findings, "ok", check, "")
	}
	wantFinding(t, findings, "warn", "workers", "none has registered")

	// Nothing is left of the examination.
	js := streamsOf(t, farm)
	for _, name := range []string{"OBJ_cas-s-1-0", "OBJ_cas-l-1-0", "KV_ac-1"} {
		s, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if n := s.CachedInfo().State.Msgs; n != 0 {
			t.Errorf("%d messages are left in %s", n, name)
		}
	}

	s, err := js.Stream(t.Context(), "KV_ac-1")
	if err != nil {
		t.Fatal(err)
	}
	changed := s.CachedInfo().Config
	changed.RePublish = nil
	if _, err := js.UpdateStream(t.Context(), changed); err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteStream(t.Context(), "FLIGHTS"); err != nil {
		t.Fatal(err)
	}
	findings, _ = doctor(t, "--nats", farm.URL())
	wantFinding(t, findings, "fail", "streams", "missing: FLIGHTS")
	wantFinding(t, findings, "warn", "configuration", "does not tell its changes")
	wantFinding(t, findings, "ok", "storage", "")
}

// TestDoctorFrontend: what answers in place of a frontend.
func TestDoctorFrontend(t *testing.T) {
	farm := wholeFarm(t)
	busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "drains\x1b[2J", http.StatusServiceUnavailable)
	}))
	defer busy.Close()
	address := strings.TrimPrefix(busy.URL, "http://")
	findings, _ := doctor(t, "--nats", farm.URL(), "--grpc", address, "--http", address)
	wantFinding(t, findings, "fail", "frontend", "does not tell its capabilities")
	wantFinding(t, findings, "fail", "readyz", "503")

	var out bytes.Buffer
	err := app.Run(t.Context(), []string{"doctor", "--nats", farm.URL(), "--http", address}, &out, io.Discard)
	if err == nil || strings.Contains(out.String(), "\x1b") || !strings.Contains(out.String(), "\nfail readyz: ") || !strings.Contains(out.String(), "\n     fix: ") {
		t.Errorf("error %v, printed\n%s", err, out.String())
	}
}

// TestDoctorFindsTheCause: the nearest cause is the failure, and nothing that depends on it is said.
func TestDoctorFindsTheCause(t *testing.T) {
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "nats://" + listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		url, check, text string
	}{
		"refused":         {closed, "address", "nothing listens"},
		"no such host":    {"nats://no-such-host.invalid:4222", "address", "no-such-host.invalid"},
		"no address":      {"nats://user:secret@", "address", "is not the address"},
		"nonsense":        {"%%%", "address", "is not the address"},
		"no jetstream":    {natsServer(t, server.Options{}), "jetstream", "it is off"},
		"credentials":     {natsServer(t, server.Options{Username: "u", Password: "p"}), "nats", "refuses this client"},
		"no farm":         {natsServer(t, server.Options{JetStream: true, StoreDir: t.TempDir()}), "streams", "no farm has used this server"},
		"small payload":   {natsServer(t, server.Options{MaxPayload: 64 << 10}), "max_payload", "at least 1.0 MiB are needed"},
		"another program": {other(t), "nats", "no handshake"},
	} {
		t.Run(name, func(t *testing.T) {
			findings, err := doctor(t, "--nats", test.url)
			wantFinding(t, findings, "fail", test.check, test.text)
			if err == nil || errors.As(err, new(run.UsageError)) || !strings.Contains(err.Error(), "begin with "+test.check) {
				t.Errorf("error %v", err)
			}
			for _, f := range findings {
				if strings.Contains(f.Text, "secret") {
					t.Errorf("a password is printed: %+v", f)
				}
			}
		})
	}
}

// natsServer is one that is not jetfarm's own.
func natsServer(t *testing.T, opts server.Options) string {
	t.Helper()
	opts.Host, opts.Port, opts.NoSigs, opts.NoLog = "127.0.0.1", server.RANDOM_PORT, true, true
	s, err := server.NewServer(&opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	if !s.ReadyForConnections(time.Minute) {
		t.Fatal("the server does not start")
	}
	return s.ClientURL()
}

// other is the address of a program that does not speak NATS.
func other(t *testing.T) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var group errgroup.Group
	group.Go(func() error {
		for {
			conn, err := l.Accept()
			if err != nil {
				return nil //nolint:nilerr // the test is over
			}
			_, err = io.WriteString(conn, "220 mail.example.com ESMTP\r\n")
			if err := errors.Join(err, conn.Close()); err != nil && !errors.Is(err, net.ErrClosed) {
				return err
			}
		}
	})
	t.Cleanup(func() {
		if err := errors.Join(l.Close(), group.Wait()); err != nil {
			t.Error(err)
		}
	})
	return "nats://" + l.Addr().String()
}

func TestDoctorOfAWorker(t *testing.T) {
	dir := t.TempDir()
	findings, err := doctor(t, "--worker", "--data", filepath.Join(dir, "not/yet"))
	wantFinding(t, findings, "ok", "data directory", "is made at the first start")
	if status := findings["isolation"].Status; status == "" || (status == "fail") != (err != nil) {
		t.Errorf("isolation is %q, error %v", status, err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	findings, _ = doctor(t, "--worker", "--data", file)
	wantFinding(t, findings, "fail", "data directory", "is a file")
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("the examination has left %v, error %v", left, err)
	}
	for _, args := range [][]string{{"--worker", "--grpc", "127.0.0.1:1"}, {"--grpc", "nonsense"}, {"--frobnicate"}} {
		err := app.Run(t.Context(), append([]string{"doctor"}, args...), io.Discard, io.Discard)
		if !errors.As(err, new(run.UsageError)) {
			t.Errorf("doctor %v: error %v, want one of usage", args, err)
		}
	}
}
