package upstream_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/credentials"

	"github.com/jetfarm/jetfarm/cas/upstream"
)

func TestParseEndpoint(t *testing.T) {
	for text, want := range map[string]upstream.Endpoint{
		"grpc://cache":                   {Address: "cache:8980"},
		"grpc://cache:1":                 {Address: "cache:1"},
		"grpc://cache:1/":                {Address: "cache:1"},
		"grpcs://cache.example":          {Address: "cache.example:443", Secure: true},
		"grpcs://cache.example:8443/a/b": {Address: "cache.example:8443", Secure: true, Instance: "a/b"},
		"grpc://10.0.0.1:9092/main":      {Address: "10.0.0.1:9092", Instance: "main"},
		"grpc://[::1]:9092":              {Address: "[::1]:9092"},
		"grpc://[::1]":                   {Address: "[::1]:8980"},
		"grpc://cache/über":              {Address: "cache:8980", Instance: "über"},
	} {
		got, err := upstream.ParseEndpoint(text)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: error %v (-want +got):\n%s", text, err, diff)
		}
	}
	for _, text := range []string{
		"", "cache", "cache:8980", "http://cache", "grpc:cache", "grpc://", "grpc:///a", "grpc://:8980", "grpc://cache:0",
		"grpc://cache:99999", "grpc://cache:x", "grpc://cache/a/blobs/b", "grpc://cache/a//b", "grpc://cache/" + strings.Repeat("a", 300),
		"grpc://cache?x=secret", "grpc://cache#secret", "grpc://secret@cache", "grpc://user:secret@cache", "grpc://user:secret@cache:x/%zz",
	} {
		_, err := upstream.ParseEndpoint(text)
		if err == nil {
			t.Errorf("%q was accepted", text)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: the error shows the secret: %v", text, err)
		}
	}
}

func FuzzParseEndpoint(f *testing.F) {
	for _, seed := range []string{"grpc://cache:8980/a/b", "grpcs://[::1]", "grpc://u:p@h/?q#f", "grpc://\x00", "grpc://h:/"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := upstream.ParseEndpoint(text)
		if err != nil {
			return
		}
		if _, port, err := net.SplitHostPort(e.Address); err != nil || port == "" {
			t.Errorf("%q has the address %q: %v", text, e.Address, err)
		}
	})
}

func TestParseHeaders(t *testing.T) {
	got, err := upstream.ParseHeaders([]string{"Authorization=Bearer a=b==", "x-team=", "X-TEAM=two", "token-bin=\x00\xff"})
	want := map[string][]string{"authorization": {"Bearer a=b=="}, "x-team": {"", "two"}, "token-bin": {"\x00\xff"}}
	if diff := cmp.Diff(want, map[string][]string(got)); err != nil || diff != "" {
		t.Errorf("error %v (-want +got):\n%s", err, diff)
	}
	for _, pair := range []string{"secret", "=secret", "grpc-timeout=secret", "a b=secret", "ü=secret", "x=secret\n", "x=secretü"} {
		_, err := upstream.ParseHeaders([]string{pair})
		if err == nil {
			t.Errorf("%q was accepted", pair)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: the error shows the value: %v", pair, err)
		}
	}
}

// authority is a certificate for loopback, and the file that vouches for it.
func authority(t testing.TB) (credentials.TransportCredentials, string) { //nolint:ireturn // the library has no type for it
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}), file
}

func TestTLS(t *testing.T) {
	server, ca := authority(t)
	_, otherCA := authority(t)
	f := startSecure(t, server)
	d, data := add(t, f.blobs, 1<<20)
	secure := func(ca string) func(*upstream.Config) {
		return func(cfg *upstream.Config) { cfg.Endpoint.Secure, cfg.CA = true, ca }
	}
	wantBlob(t, connect(t, f.address, secure(ca)), d, data)
	for name, c := range map[string]*upstream.Client{
		"another authority": connect(t, f.address, secure(otherCA)),
		"the system's":      connect(t, f.address, secure("")),
		"no TLS":            connect(t, f.address, func(cfg *upstream.Config) { cfg.Stall = time.Second }),
	} {
		if !c.Down() {
			t.Errorf("a client with %s trusts the server", name)
		}
	}
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]upstream.Config{
		"no certificates": {Endpoint: upstream.Endpoint{Address: f.address, Secure: true}, CA: empty},
		"no file":         {Endpoint: upstream.Endpoint{Address: f.address, Secure: true}, CA: empty + ".not"},
		"no TLS":          {Endpoint: upstream.Endpoint{Address: f.address}, CA: ca},
	} {
		cfg.Log = quiet()
		if _, err := upstream.Open(t.Context(), cfg); err == nil {
			t.Errorf("a configuration with %s was accepted", name)
		}
	}
}
