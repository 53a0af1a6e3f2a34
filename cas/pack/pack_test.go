package pack_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/pack"
)

// blob is the i-th of a space; their sizes differ.
func blob(t testing.TB, space digest.Space, i, size int) (digest.Digest, []byte) {
	t.Helper()
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	if _, err := r.Read(data); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint64(data, uint64(i))
	return space.Of(data), data
}

func spaceOf(t testing.TB, instance string, f repb.DigestFunction_Value) digest.Space {
	t.Helper()
	s, err := digest.SpaceOf(instance, f, "")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func sha256(t testing.TB) digest.Space {
	t.Helper()
	return spaceOf(t, "", repb.DigestFunction_SHA256)
}

// blobs are n of them, of 9 to about 20 000 bytes.
func blobs(t testing.TB, n int) (ds []digest.Digest, data [][]byte) {
	t.Helper()
	space := sha256(t)
	for i := range n {
		d, b := blob(t, space, i, 9+i*7919%20_000)
		ds, data = append(ds, d), append(data, b)
	}
	return ds, data
}

func config(dir string, maxBytes int64) pack.Config {
	room := func() (total, free int64, err error) { return 1 << 40, 1 << 40, nil }
	return pack.Config{Dir: dir, MaxBytes: maxBytes, Log: slog.New(slog.DiscardHandler), Room: room}
}

func open(t testing.TB, cfg pack.Config) *pack.Pack {
	t.Helper()
	p, err := pack.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func shut(t testing.TB, p *pack.Pack) {
	t.Helper()
	if err := p.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// held counts the blobs that the pack has, which must be right.
func held(t testing.TB, p *pack.Pack, ds []digest.Digest, data [][]byte) (n int) {
	t.Helper()
	for i, d := range ds {
		got, ok := p.Get(d)
		if !ok {
			continue
		}
		n++
		if !bytes.Equal(got, data[i]) {
			t.Fatalf("blob %d is wrong", i)
		}
	}
	return n
}

// snapshot copies the files of a pack as a kill would leave them.
func snapshot(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

func files(t testing.TB, dir, kind string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "*"+kind))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func usage(t testing.TB, dir string) (n int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		n += info.Size()
	}
	return n
}

func TestBlobsAreThereAfterARestartAndAfterAKill(t *testing.T) {
	dir := t.TempDir()
	p := open(t, config(dir, 1<<30))
	ds, data := blobs(t, 500)
	p.Add(ds[:1], data[:1])
	p.Add(ds[:400], data[:400])
	if n := held(t, p, ds, data); n != 400 {
		t.Errorf("%d blobs are held, want 400", n)
	}
	killed := snapshot(t, dir)
	shut(t, p)
	if len(files(t, dir, ".table")) != 1 || len(files(t, killed, ".table")) != 0 {
		t.Error("a table is written by Close, and not before")
	}
	for name, dir := range map[string]string{"restart": dir, "kill": killed} {
		for range 3 { // the first start writes the table that is missing
			p := open(t, config(dir, 1<<30))
			if n := held(t, p, ds, data); n != 400 {
				t.Errorf("%s: %d blobs are held, want 400", name, n)
			}
			shut(t, p)
		}
		p := open(t, config(dir, 1<<30))
		p.Add(ds, data)
		if n := held(t, p, ds, data); n != 500 {
			t.Errorf("%s: %d blobs are held, want 500", name, n)
		}
		shut(t, p)
	}
}

func TestDirectoryHasOneUser(t *testing.T) {
	dir := t.TempDir()
	p := open(t, config(dir, pack.MinBytes))
	if _, err := pack.Open(t.Context(), config(dir, pack.MinBytes)); err == nil {
		t.Error("a second pack has the same directory")
	}
	shut(t, p)
	shut(t, open(t, config(dir, pack.MinBytes)))
	if _, err := pack.Open(t.Context(), config(dir, pack.MinBytes-1)); err == nil {
		t.Error("a pack without room is opened")
	}
}

func TestSpacesAndSizesAreApart(t *testing.T) {
	p := open(t, config(t.TempDir(), pack.MinBytes))
	defer shut(t, p)
	d, data := blob(t, sha256(t), 1, 1000)
	p.Add([]digest.Digest{d}, [][]byte{data})
	for _, space := range []digest.Space{spaceOf(t, "other", repb.DigestFunction_SHA256), spaceOf(t, "", repb.DigestFunction_BLAKE3)} {
		same, err := space.New(d.Hash(), d.Size())
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := p.Get(same); ok {
			t.Errorf("%v is given out for %v", d, same)
		}
		own, data := blob(t, space, 1, 1000)
		p.Add([]digest.Digest{own}, [][]byte{data})
		if held(t, p, []digest.Digest{own}, [][]byte{data}) != 1 {
			t.Errorf("%v is not kept", own)
		}
	}
	longer, err := d.Space().New(d.Hash(), d.Size()+1)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := p.Get(longer); ok {
		t.Error("a blob is given out for another size")
	}
	if held(t, p, []digest.Digest{d}, [][]byte{data}) != 1 {
		t.Error("the blob is gone")
	}
}

// What is not the blob is never given out, and makes room for what is.
func TestWrongBytesAreNotGivenOut(t *testing.T) {
	p := open(t, config(t.TempDir(), pack.MinBytes))
	defer shut(t, p)
	d, data := blob(t, sha256(t), 1, 1000)
	_, other := blob(t, sha256(t), 2, 1000)
	one := []digest.Digest{d}
	p.Add(one, [][]byte{other})
	if _, ok := p.Get(d); ok {
		t.Error("wrong bytes are given out")
	}
	p.Add(one, [][]byte{data[:999]})
	p.Add(one, [][]byte{data})
	if held(t, p, one, [][]byte{data}) != 1 {
		t.Error("the blob is not kept after wrong bytes")
	}
	large, bytes := blob(t, sha256(t), 3, pack.MaxBlob+1)
	p.Add([]digest.Digest{large}, [][]byte{bytes})
	if _, ok := p.Get(large); ok {
		t.Error("a large blob is kept")
	}
}

// The files never take more than they may, whatever is added, and the newest blobs stay.
func TestBound(t *testing.T) {
	for _, size := range []int{10, 3000, pack.MaxBlob} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := t.TempDir()
			p := open(t, config(dir, pack.MinBytes))
			defer func() { shut(t, p) }()
			var ds []digest.Digest
			var data [][]byte
			count := int(3*pack.MinBytes/max(2048, pack.RecordSize(int64(size)))) / 100 * 100
			for i := range count {
				d, b := blob(t, sha256(t), i, size)
				ds, data = append(ds, d), append(data, b)
				if len(ds)%10 > 0 {
					continue
				}
				p.Add(ds[i-9:], data[i-9:])
				p.Tend(t.Context())
				if n := usage(t, dir); n > pack.MinBytes {
					t.Fatalf("the files take %d bytes after %d blobs, want at most %d", n, i, int64(pack.MinBytes))
				}
			}
			kept := int(pack.MinBytes / max(2048, pack.RecordSize(int64(size))) * 3 / 4)
			for range 2 {
				if n := held(t, p, ds[count-kept:], data[count-kept:]); n != kept {
					t.Errorf("%d of the last %d blobs are held", n, kept)
				}
				if n := held(t, p, ds[:count/3], data[:count/3]); n != 0 {
					t.Errorf("%d of the first blobs are held", n)
				}
				shut(t, p)
				p = open(t, config(dir, pack.MinBytes))
			}
		})
	}
}

// A pack that may have less than before gives the rest back at its start.
func TestLessRoomThanBefore(t *testing.T) {
	dir := t.TempDir()
	p := open(t, config(dir, 4*pack.MinBytes))
	ds, data := blobs(t, 4000)
	for i := 0; i < len(ds); i += 100 {
		p.Add(ds[i:i+100], data[i:i+100])
		p.Tend(t.Context())
	}
	shut(t, p)
	p = open(t, config(dir, pack.MinBytes))
	defer shut(t, p)
	if n := usage(t, dir); n > pack.MinBytes {
		t.Errorf("the files take %d bytes", n)
	}
	if held(t, p, ds[3500:], data[3500:]) == 0 {
		t.Error("nothing of the newest is held")
	}
}

// On a disk with little room a pack gives back what it has, oldest first, and takes nothing.
func TestCopiesGiveWayOnACrowdedDisk(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir, pack.MinBytes)
	free := int64(1 << 40)
	cfg.Room = func() (total, left int64, err error) { return 64 << 30, free - usage(t, dir), nil }
	p := open(t, cfg)
	defer shut(t, p)
	ds, data := blobs(t, 1000)
	for i := 0; i < len(ds); i += 100 {
		p.Add(ds[i:i+100], data[i:i+100])
		p.Tend(t.Context())
	}
	before := usage(t, dir)
	free = 4<<30 + before - 3<<20 // 3 MiB are too much
	p.Tend(t.Context())
	if after := usage(t, dir); after > before-3<<20 || after < before-5<<20 {
		t.Errorf("the files take %d bytes after %d", after, before)
	}
	if held(t, p, ds[990:], data[990:]) != 10 {
		t.Error("the newest are gone")
	}
	free = 0
	p.Tend(t.Context())
	p.Add(ds, data)
	if n, left := held(t, p, ds, data), usage(t, dir); n > 0 || left > 0 {
		t.Errorf("%d blobs are held in %d bytes of a full disk", n, left)
	}
	free = 1 << 40
	p.Tend(t.Context())
	p.Add(ds[:10], data[:10])
	if held(t, p, ds[:10], data[:10]) != 10 {
		t.Error("nothing is kept after there was room again")
	}
}

func TestManyAtOnce(t *testing.T) {
	cfg := config(t.TempDir(), pack.MinBytes)
	cfg.Registerer = prometheus.NewRegistry()
	p := open(t, cfg)
	defer shut(t, p)
	ds, data := blobs(t, 2000)
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			for round := range 4 {
				for i := (w + round) % 4 * 500; i < len(ds); i += 20 {
					p.Add(ds[i:i+20], data[i:i+20])
					held(t, p, ds[i/2:i/2+20], data[i/2:i/2+20])
				}
			}
		})
	}
	group.Go(func() {
		for range 200 {
			p.Tend(t.Context())
		}
	})
	group.Wait()
	if held(t, p, ds, data) == 0 {
		t.Error("nothing is held")
	}
}
