package objectstore_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

func TestOpenBuildsIndex(t *testing.T) {
	f := brokertest.Start(t)
	first := open(t, config(t, f))
	var ds []digest.Digest
	for _, instance := range []string{"", "a", "a/b"} {
		for _, size := range []int{1000, 1001, 512 << 10, 512<<10 + 1, 2 << 20} {
			d, data := castest.Blob(castest.Space(t, instance), size)
			if err := first.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
			ds = append(ds, d)
		}
	}
	f.Restart(t)
	if got := missing(t, open(t, config(t, f)), ds...); len(got) != 0 {
		t.Errorf("after a restart %v are missing", got)
	}
}

// A question about many blobs is answered as those about each of them are.
func TestMissingOfMany(t *testing.T) {
	s := open(t, config(t, brokertest.Start(t)))
	var ask, want []digest.Digest
	for i := range 700 {
		d, data := castest.Blob(castest.Space(t, []string{"", "team"}[i%2]), 100+i)
		if i%3 == 0 {
			if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
		}
		larger, err := d.Space().New(d.Hash(), d.Size()+1)
		if err != nil {
			t.Fatal(err)
		}
		ask = append(ask, d, d.Space().Of(nil), larger, d)
	}
	for i, d := range ask {
		if !slices.Contains(ask[:i], d) {
			want = append(want, missing(t, s, d)...)
		}
	}
	got := missing(t, s, ask...)
	if len(want) != 700+700-234 || !slices.Equal(got, want) {
		t.Errorf("%d of %d blobs are missing, one by one %d", len(got), len(ask), len(want))
	}
}

// What one process stores, the others soon know.
func TestAnnouncements(t *testing.T) {
	f := brokertest.Start(t)
	a, b := running(t, config(t, f)), running(t, config(t, f))
	for _, instance := range []string{"", "team"} {
		for _, size := range []int{1000, 1 << 20} {
			d, data := castest.Blob(castest.Space(t, instance), size)
			if err := a.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the blob is announced", func() bool { return len(missing(t, b, d)) == 0 })
		}
	}
}

// The form is frozen: other versions of this program send and receive it.
func TestAnnouncementForm(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	sub, err := nc.SubscribeSync(objectstore.SubjectIndex)
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	s := running(t, config(t, f))
	for _, test := range []struct {
		instance string
		data     []byte
		want     string
	}{
		{"", []byte("hello"), "01SSSSSSSSSSSSSSSS" + "2cf24dba5fb0a30e26e83b2ac5b9e29e" + "0000100000000005"},
		{"x", []byte("hello"), "01SSSSSSSSSSSSSSSS" + "b67abf8532d4cb4592004a1781dacfc5" + "0000100000000005"},
		{"", make([]byte, 1<<20), "01SSSSSSSSSSSSSSSS" + "30e14955ebf1352266dc2ff8067e6810" + "0000180000100000"},
	} {
		if _, err := cas.PutBytes(t.Context(), s, castest.Space(t, test.instance), test.data); err != nil {
			t.Fatal(err)
		}
		m, err := sub.NextMsg(5 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		sender := hex.EncodeToString(m.Data[1:9])
		got := strings.Replace(hex.EncodeToString(m.Data), sender, "SSSSSSSSSSSSSSSS", 1)
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("announcement of %d bytes in %q (-want +got):\n%s", len(test.data), test.instance, diff)
		}
	}
}

// Announcements that are broken, of another version or of a generation that does not live here
// change nothing.
func TestForeignAnnouncements(t *testing.T) {
	f := brokertest.Start(t)
	s := running(t, config(t, f))
	known, _ := stored(t, s, 1000)
	absent, _ := castest.Blob(castest.Space(t, ""), 5)
	key, err := hex.DecodeString(absent.Hash()[:32])
	if err != nil {
		t.Fatal(err)
	}
	nc := f.Connect(t)
	announce := func(head byte, entry string) {
		t.Helper()
		tail, err := hex.DecodeString(entry)
		if err != nil {
			t.Fatal(err)
		}
		if err := nc.Publish(objectstore.SubjectIndex, slices.Concat([]byte{head}, make([]byte, 8), key, tail)); err != nil {
			t.Fatal(err)
		}
	}
	announce(2, "0000100000000005")
	announce(1, "00001000000005")
	announce(1, "0000200000000005")
	if err := nc.Publish(objectstore.SubjectIndex, nil); err != nil {
		t.Fatal(err)
	}
	last, _ := castest.Blob(castest.Space(t, ""), 1)
	key, err = hex.DecodeString(last.Hash()[:32])
	if err != nil {
		t.Fatal(err)
	}
	announce(1, "0000100000000001")
	eventually(t, "the last announcement arrives", func() bool { return len(missing(t, s, last)) == 0 })
	if got := missing(t, s, known, absent); len(got) != 1 || got[0] != absent {
		t.Errorf("missing %v, want %v", got, absent)
	}

	// The announcement was a lie; a read finds out.
	if _, err := s.Open(t.Context(), last, 0); !errors.Is(err, cas.ErrNotFound) {
		t.Errorf("Open: error %v, want %v", err, cas.ErrNotFound)
	}
	if len(missing(t, s, last)) != 1 {
		t.Error("a blob that is not there is still present")
	}
}

// A process that was cut off learns what it missed when it is back.
func TestIndexIsRepairedAfterReconnect(t *testing.T) {
	f := brokertest.Start(t)
	p := newProxy(t, f)
	a := running(t, config(t, f))
	registry := prometheus.NewRegistry()
	b := running(t, objectstore.Config{Small: p.connect(t), Bulk: p.connect(t), Log: quiet(), Registerer: registry})
	listening(t, registry)
	first, _ := stored(t, a, 1000)
	eventually(t, "announcements arrive", func() bool { return len(missing(t, b, first)) == 0 })

	p.refusing.Store(true)
	p.cut()
	var ds []digest.Digest
	for _, size := range []int{100, 1 << 20} {
		d, _ := stored(t, a, size)
		ds = append(ds, d)
	}
	flush := f.Connect(t)
	sub, err := flush.SubscribeSync(objectstore.SubjectIndex)
	if err != nil {
		t.Fatal(err)
	}
	if err := flush.Flush(); err != nil {
		t.Fatal(err)
	}
	d, _ := stored(t, a, 50) // announced after the others
	ds = append(ds, d)
	if _, err := sub.NextMsg(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	// A process that is cut off for longer than it may trust what it knows says that it cannot tell.
	unknown := func() int {
		absent, err := b.Missing(t.Context(), ds)
		if err != nil && !errors.Is(err, cas.ErrUnavailable) {
			t.Fatalf("Missing: %v", err)
		}
		if err != nil {
			return len(ds)
		}
		return len(absent)
	}
	if unknown() != len(ds) {
		t.Fatal("the process was not cut off")
	}
	p.refusing.Store(false)
	eventually(t, "the index is repaired", func() bool { return unknown() == 0 })
}

// Before Run, and when an announcement was lost, blobs of others are found by asking.
func TestBlobsOfOthersWithoutAnnouncement(t *testing.T) {
	f := brokertest.Start(t)
	a := open(t, config(t, f))
	for _, size := range []int{1000, 2 << 20} {
		opening, confirming, putting := open(t, config(t, f)), open(t, config(t, f)), open(t, config(t, f))
		d, data := stored(t, a, size)
		absent, _ := castest.Blob(castest.Space(t, ""), size)
		wrongSize, err := d.Space().New(d.Hash(), int64(size+1))
		if err != nil {
			t.Fatal(err)
		}
		impossible, err := d.Space().New(d.Hash(), 0)
		if err != nil {
			t.Fatal(err)
		}
		ds := []digest.Digest{absent, d, wrongSize, impossible, absent, d.Space().Of(nil)}

		if got, err := cas.ReadAll(t.Context(), opening, d, d.Size()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("Open: %d bytes, error %v", len(got), err)
		}
		if len(missing(t, opening, d)) != 0 {
			t.Error("a blob that was read is missing")
		}

		if len(missing(t, confirming, d)) != 1 {
			t.Error("the announcement was not lost")
		}
		got, err := confirming.Confirm(t.Context(), ds)
		if err != nil {
			t.Fatalf("Confirm: %v", err)
		}
		if diff := cmp.Diff([]string{absent.String(), wrongSize.String(), impossible.String()}, names(got)); diff != "" {
			t.Errorf("Confirm (-want +got):\n%s", diff)
		}
		if len(missing(t, confirming, d)) != 0 {
			t.Error("a confirmed blob is missing")
		}

		if err := putting.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
			t.Errorf("Put of what another process stored: %v", err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errStop)
	if _, err := a.Confirm(ctx, absentBlobs(t, 3)); !errors.Is(err, errStop) {
		t.Errorf("Confirm with a done context: error %v, want %v", err, errStop)
	}
}

// Writes go to the newest generation, reads to all, and a shard is found by its digest.
func TestGenerationsAndShards(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	first := open(t, config(t, f))
	var old []digest.Digest
	for _, size := range []int{1000, 2 << 20} {
		d, _ := stored(t, first, size)
		old = append(old, d)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for _, bucket := range []string{"cas-s-2-0", "cas-s-2-1", "cas-l-2-1"} {
		_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
			Name: "OBJ_" + bucket, Subjects: []string{"$O." + bucket + ".C.>", "$O." + bucket + ".M.>"}, AllowDirect: true,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"OBJ_cas-x-3-0", "OBJ_cas-s-03-0", "OBJ_other", "cas-s-9-0"} {
		if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: name, Subjects: []string{"foreign." + name}}); err != nil {
			t.Fatal(err)
		}
	}

	s := open(t, config(t, f))
	if got := missing(t, s, old...); len(got) != 0 {
		t.Errorf("blobs of the old generation are missing: %v", got)
	}
	before := streamState(t, nc, smallStream).Msgs
	var fresh []digest.Digest
	for range 20 {
		for _, size := range []int{1000, 600 << 10} {
			d, _ := stored(t, s, size)
			fresh = append(fresh, d)
		}
	}
	if got := streamState(t, nc, smallStream).Msgs; got != before {
		t.Errorf("the old generation has %d messages, had %d", got, before)
	}
	for _, stream := range []string{"OBJ_cas-s-2-0", "OBJ_cas-s-2-1", "OBJ_cas-l-2-0", "OBJ_cas-l-2-1"} {
		if streamState(t, nc, stream).Msgs == 0 {
			t.Errorf("no blob went to %s", stream)
		}
	}
	third := open(t, config(t, f))
	for _, d := range append(old, fresh...) {
		if _, err := cas.ReadAll(t.Context(), third, d, d.Size()); err != nil {
			t.Errorf("read of a blob of some generation: %v", err)
		}
	}
}

func TestMetrics(t *testing.T) {
	f := brokertest.Start(t)
	cfg := config(t, f)
	registry := prometheus.NewRegistry()
	cfg.Registerer = registry
	s := open(t, cfg)
	d, _ := stored(t, s, 1000)
	if _, err := cas.ReadAll(t.Context(), s, d, d.Size()); err != nil {
		t.Fatal(err)
	}
	absent, _ := castest.Blob(castest.Space(t, ""), 10)
	if _, err := s.Open(t.Context(), absent, 0); !errors.Is(err, cas.ErrNotFound) {
		t.Errorf("Open: error %v, want %v", err, cas.ErrNotFound)
	}

	got := values(t, registry)
	want := map[string]float64{
		"jetfarm_cas_puts_total ok": 1, "jetfarm_cas_gets_total ok": 1, "jetfarm_cas_gets_total not_found": 1,
		"jetfarm_cas_written_bytes_total": 1000, "jetfarm_cas_read_bytes_total": 1000, "jetfarm_cas_index_entries": 1,
		"jetfarm_cas_announcements_lost_total": 0, "jetfarm_cas_index_repairs_total": 0, "jetfarm_cas_orphaned_uploads_total": 0,
		"jetfarm_cas_generations": 1, "jetfarm_cas_stored_bytes": 0, "jetfarm_cas_limit_bytes": 0, "jetfarm_cas_full": 0,
		"jetfarm_cas_rotations_total": 0, "jetfarm_cas_evicted_blobs_total": 0, "jetfarm_cas_evicted_bytes_total": 0,
		"jetfarm_cas_evicted_age_seconds": 0, "jetfarm_cas_purged_uploads_total": 0, "jetfarm_cas_copied_blobs_total": 0,
		"jetfarm_cas_copied_bytes_total": 0, "jetfarm_cas_copy_failures_total": 0,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
	if _, err := objectstore.Open(t.Context(), cfg); err == nil {
		t.Error("a second Open with the same registry succeeded")
	}
}

func TestOpenRefusesConfig(t *testing.T) {
	f := brokertest.Start(t)
	for name, spoil := range map[string]func(*objectstore.Config){
		"no connection": func(c *objectstore.Config) { c.Small = nil },
		"no log":        func(c *objectstore.Config) { c.Log = nil },
		"replicas":      func(c *objectstore.Config) { c.Replicas = -1 },
		"budget":        func(c *objectstore.Config) { c.WriteBudget = 1 },
		"bound":         func(c *objectstore.Config) { c.StallTimeout = -1 },
	} {
		cfg := config(t, f)
		spoil(&cfg)
		if _, err := objectstore.Open(t.Context(), cfg); err == nil {
			t.Errorf("Open with bad %s succeeded", name)
		}
	}
	closed := f.Connect(t)
	closed.Close()
	_, err := objectstore.Open(t.Context(), objectstore.Config{Small: closed, Bulk: closed, Log: logger(t)})
	if !errors.Is(err, cas.ErrUnavailable) || !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("Open without a broker: error %v, want %v", err, cas.ErrUnavailable)
	}
}

func names(ds []digest.Digest) []string {
	var out []string
	for _, d := range ds {
		out = append(out, d.String())
	}
	return out
}

// values returns what the metrics say, by name and label values.
func values(t testing.TB, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			name := family.GetName()
			for _, label := range m.GetLabel() {
				name += " " + label.GetValue()
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}
