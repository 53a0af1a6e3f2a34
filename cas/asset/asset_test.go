package asset_test

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/asset"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestNames(t *testing.T) {
	nc := brokertest.Start(t).Connect(t)
	names, err := asset.Open(t.Context(), asset.Config{Conn: nc, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	space := castest.Space(t, "team/a")
	name := asset.Name{Space: space, Kind: asset.Blob, URI: "https://example.com/a b?x=1#é", Qualifiers: []asset.Qualifier{{"b", "2"}, {"a", "1"}}}
	entry := asset.Entry{
		Digest: space.Of([]byte("x")), Stored: time.Now().UTC(), Expires: time.Now().Add(time.Hour).UTC(),
		Blobs: []digest.Digest{space.Of([]byte("y"))}, Directories: []digest.Digest{space.Of([]byte("z"))},
	}
	if e, err := names.Get(t.Context(), name); !errors.Is(err, asset.ErrNotFound) {
		t.Errorf("Get before Put: %v, %v", e, err)
	}
	for range 2 {
		if err := names.Put(t.Context(), name, entry); err != nil {
			t.Fatal(err)
		}
	}
	again := name
	again.Qualifiers = []asset.Qualifier{{"a", "1"}, {"b", "2"}}
	got, err := names.Get(t.Context(), again)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(entry, got, cmp.Comparer(func(a, b digest.Digest) bool { return a == b })); diff != "" {
		t.Errorf("Get (-want +got):\n%s", diff)
	}
	for what, change := range map[string]func(*asset.Name){
		"space":           func(n *asset.Name) { n.Space = castest.Space(t, "team/b") },
		"kind":            func(n *asset.Name) { n.Kind = asset.Directory },
		"URI":             func(n *asset.Name) { n.URI += "x" },
		"fewer":           func(n *asset.Name) { n.Qualifiers = n.Qualifiers[:1] },
		"more":            func(n *asset.Name) { n.Qualifiers = append(n.Qualifiers, asset.Qualifier{}) },
		"other value":     func(n *asset.Name) { n.Qualifiers = []asset.Qualifier{{"a", "1"}, {"b", "3"}} },
		"moved over":      func(n *asset.Name) { n.Qualifiers = []asset.Qualifier{{"a", "2"}, {"b", "1"}} },
		"part of the URI": func(n *asset.Name) { n.URI, n.Qualifiers = n.URI+"a1", n.Qualifiers[:1] },
	} {
		other := name
		change(&other)
		if e, err := names.Get(t.Context(), other); !errors.Is(err, asset.ErrNotFound) {
			t.Errorf("another %s: %v, %v, want ErrNotFound", what, e, err)
		}
	}
	entry.Expires = time.Now().Add(-time.Second)
	if err := names.Put(t.Context(), name, entry); err != nil {
		t.Fatal(err)
	}
	if e, err := names.Get(t.Context(), name); !errors.Is(err, asset.ErrNotFound) {
		t.Errorf("Get of what has expired: %v, %v", e, err)
	}
}

// The names are in a bucket that any client can read; URIs and qualifiers are not in it.
func TestFormat(t *testing.T) {
	nc := brokertest.Start(t).Connect(t)
	names, err := asset.Open(t.Context(), asset.Config{Conn: nc, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	space := castest.Space(t, "")
	name := asset.Name{Space: space, Kind: asset.Directory, URI: "https://user:secret@example.com/", Qualifiers: []asset.Qualifier{{"q", "v"}}}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if err := names.Put(t.Context(), name, asset.Entry{Digest: space.Of(nil), Stored: at}); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.KeyValue(t.Context(), "asset-1")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := kv.Keys(t.Context())
	if err != nil || len(keys) != 1 {
		t.Fatalf("keys %v, %v", keys, err)
	}
	if want := "sha256.directory.52a64f39ccf1a96f877d57b65a1e11d57939ec47b0879f659a22ebb538f4a6b4"; keys[0] != want {
		t.Errorf("key %s, want %s", keys[0], want)
	}
	e, err := kv.Get(t.Context(), keys[0])
	if err != nil {
		t.Fatal(err)
	}
	want := `{"blob":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/0","stored":"2026-01-02T03:04:05Z"}`
	if string(e.Value()) != want {
		t.Errorf("value %s, want %s", e.Value(), want)
	}
	if _, err := kv.Put(t.Context(), keys[0], []byte("nonsense")); err != nil {
		t.Fatal(err)
	}
	if got, err := names.Get(t.Context(), name); !errors.Is(err, asset.ErrNotFound) {
		t.Errorf("Get of a damaged entry: %v, %v", got, err)
	}
}

func TestOldNamesGiveWay(t *testing.T) {
	nc := brokertest.Start(t).Connect(t)
	names, err := asset.Open(t.Context(), asset.Config{Conn: nc, MaxBytes: 64 << 10, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	space := castest.Space(t, "")
	name := func(i int) asset.Name {
		return asset.Name{Space: space, Kind: asset.Blob, URI: string(rune('a' + i%26)), Qualifiers: []asset.Qualifier{{"n", string(rune(i))}}}
	}
	for i := range 500 {
		if err := names.Put(t.Context(), name(i), asset.Entry{Digest: space.Of(nil)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := names.Get(t.Context(), name(0)); !errors.Is(err, asset.ErrNotFound) {
		t.Errorf("the oldest name: error %v, want ErrNotFound", err)
	}
	if _, err := names.Get(t.Context(), name(499)); err != nil {
		t.Errorf("the newest name: %v", err)
	}
	nc.Close()
	if _, err := names.Get(t.Context(), name(499)); !errors.Is(err, cas.ErrUnavailable) {
		t.Errorf("without a broker: error %v, want ErrUnavailable", err)
	}
}
