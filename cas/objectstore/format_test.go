package objectstore_test

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
)

// Stock clients list and read what this package writes.
func TestStockClientReads(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, config(t, f))
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{}
	for _, instance := range []string{"", "team/größe"} {
		for bucket, size := range map[string]int{"cas-s-1-0": 1 << 10, "cas-l-1-0": 3<<20 + 5} {
			d, data := castest.Blob(castest.Space(t, instance), size)
			if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
			want[bucket] = append(want[bucket], d.String())
			store, err := js.ObjectStore(t.Context(), bucket)
			if err != nil {
				t.Fatalf("bind %s: %v", bucket, err)
			}
			info, err := store.GetInfo(t.Context(), d.String())
			if err != nil || info.Size != uint64(size) || info.Bucket != bucket {
				t.Errorf("GetInfo(%v): %+v, error %v", d, info, err)
			}
			// GetBytes checks the SHA-256 of the metadata too.
			got, err := store.GetBytes(t.Context(), d.String())
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("GetBytes(%v): %d bytes, error %v", d, len(got), err)
			}
		}
	}
	for bucket, names := range want {
		store, err := js.ObjectStore(t.Context(), bucket)
		if err != nil {
			t.Fatal(err)
		}
		infos, err := store.List(t.Context())
		if err != nil {
			t.Fatalf("List %s: %v", bucket, err)
		}
		var got []string
		for _, info := range infos {
			got = append(got, info.Name)
		}
		slices.Sort(got)
		slices.Sort(names)
		if diff := cmp.Diff(names, got); diff != "" {
			t.Errorf("List %s (-want +got):\n%s", bucket, diff)
		}
	}
}

// The subjects and payloads are frozen: other versions of this program read them.
func TestStoredForm(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, config(t, f))
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	hello := []byte("hello, world\n")
	if _, err := cas.PutBytes(t.Context(), s, castest.Space(t, "a/b"), hello); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20+1)
	if _, err := cas.PutBytes(t.Context(), s, castest.Space(t, ""), zeros); err != nil {
		t.Fatal(err)
	}

	const hash = "853ff93762a06ddbf722c4ebe9ddd66d8f63ddaea97f521c3ecc20da7c976020"
	got := messages(t, js, "OBJ_cas-s-1-0")
	want := []string{
		"$O.cas-s-1-0.M.YS9iL2Jsb2JzLzg1M2ZmOTM3NjJhMDZkZGJmNzIyYzRlYmU5ZGRkNjZkOGY2M2RkYWVhOTdmNTIxYzNlY2MyMGRhN2M5NzYwMjAvMTM= " +
			`{"name":"a/b/blobs/` + hash + `/13","bucket":"cas-s-1-0","nuid":"85.sha256-YS9i.` + hash + `-13","size":13,` +
			`"mtime":"0001-01-01T00:00:00Z","chunks":1,"digest":"SHA-256=hT_5N2Kgbdv3IsTr6d3WbY9j3a6pf1IcPswg2nyXYCA="}`,
		"$O.cas-s-1-0.C.85.sha256-YS9i." + hash + "-13 hello, world\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("messages of a small blob (-want +got):\n%s", diff)
	}

	d := castest.Space(t, "").Of(zeros)
	got = messages(t, js, "OBJ_cas-l-1-0")
	if len(got) != 4 {
		t.Fatalf("%d messages of a large blob, want 3 chunks and metadata", len(got))
	}
	subject, body, _ := strings.Cut(got[3], " ")
	var info jetstream.ObjectInfo
	if err := json.Unmarshal([]byte(body), &info); err != nil {
		t.Fatal(err)
	}
	prefix, upload, _ := strings.Cut(info.NUID, "-1048577.-.")
	if prefix != d.Hash()[:2]+".sha256."+d.Hash() || len(upload) != 22 {
		t.Errorf("nuid %s", info.NUID)
	}
	raw := f.All(t, "OBJ_cas-l-1-0")
	for i, size := range []int{512 << 10, 512 << 10, 1} {
		if header, want := raw[i].Header.Get("Jetfarm-Chunk"), []string{"0 c253e960", "1 c253e960", "2 527d5351"}[i]; header != want {
			t.Errorf("chunk %d has the header %q, want %q", i, header, want)
		}
		chunk, data, _ := strings.Cut(got[i], " ")
		if chunk != "$O.cas-l-1-0.C."+info.NUID || len(data) != size {
			t.Errorf("chunk %d: %d bytes under %s", i, len(data), chunk)
		}
	}
	body = strings.ReplaceAll(body, d.Hash(), "HASH")
	body = strings.ReplaceAll(body, upload, "UPLOAD")
	wantBody := `{"name":"blobs/HASH/1048577","metadata":{"jetfarm-chunks":"1,1,1"},"options":{"max_chunk_size":524288},"bucket":"cas-l-1-0",` +
		`"nuid":"` + d.Hash()[:2] + `.sha256.HASH-1048577.-.UPLOAD","size":1048577,"mtime":"0001-01-01T00:00:00Z","chunks":3,"digest":"` + info.Digest + `"}`
	if diff := cmp.Diff(wantBody, body); diff != "" {
		t.Errorf("metadata of a large blob (-want +got):\n%s", diff)
	}
	if !strings.HasPrefix(subject, "$O.cas-l-1-0.M.YmxvYnMv") {
		t.Errorf("metadata under %s", subject)
	}
}

// messages returns "subject payload" of every message in a stream.
func messages(t testing.TB, js jetstream.JetStream, stream string) []string {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for sequence := uint64(1); sequence <= s.CachedInfo().State.LastSeq; sequence++ {
		m, err := s.GetMsg(t.Context(), sequence)
		if err != nil {
			continue // deleted
		}
		out = append(out, m.Subject+" "+string(m.Data))
	}
	return out
}
