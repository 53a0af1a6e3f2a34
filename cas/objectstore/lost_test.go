package objectstore_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// lostSizes are those of a small and of a large blob.
var lostSizes = []int{1000, 2 << 20}

// lose removes everything of a blob behind the stores' back.
func lose(t testing.TB, nc *nats.Conn, d digest.Digest) {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	name := smallStream
	if d.Size() > 512<<10 {
		name = largeStream
	}
	s, err := js.Stream(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	for _, filter := range []string{"$O." + name[len("OBJ_"):] + ".C." + d.Hash()[:2] + ".>", "$O." + name[len("OBJ_"):] + ".M.>"} {
		if err := s.Purge(t.Context(), jetstream.WithPurgeSubject(filter)); err != nil {
			t.Fatal(err)
		}
	}
}

// wantAgain checks that a blob that was lost can be stored through a and read through b.
func wantAgain(t testing.TB, a, b cas.Store, d digest.Digest, data []byte) {
	t.Helper()
	if err := a.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Errorf("Put of %d bytes that were lost: %v", d.Size(), err)
	}
	if got, err := cas.ReadAll(t.Context(), b, d, d.Size()); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes that were stored again, error %v", len(got), d.Size(), err)
	}
}

// A read that finds nothing makes the others forget the blob, whether or not the reader knew of it.
func TestReadMakesEverybodyForget(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	for _, size := range lostSizes {
		for _, knows := range []bool{true, false} {
			a, b := running(t, config(t, f)), running(t, config(t, f))
			d, data := stored(t, a, size)
			eventually(t, "the blob is announced", func() bool { return len(missing(t, b, d)) == 0 })
			lose(t, nc, d)
			if !knows {
				b = running(t, config(t, f))
			}
			if got := len(missing(t, b, d)) == 0; got != knows {
				t.Fatalf("the reader knows the blob: %v, want %v", got, knows)
			}
			if len(missing(t, a, d)) != 0 {
				t.Fatal("the writer has noticed the loss by itself")
			}
			if _, err := b.Open(t.Context(), d, 0); !errors.Is(err, cas.ErrNotFound) {
				t.Fatalf("Open: error %v, want %v", err, cas.ErrNotFound)
			}
			eventually(t, "the writer forgets the blob", func() bool { return len(missing(t, a, d)) == 1 })
			wantAgain(t, a, b, d, data)
		}
	}
}

// A digest of the wrong size is not there, which says nothing of the blob.
func TestReadOfWrongSizeForgetsNothing(t *testing.T) {
	f := brokertest.Start(t)
	s := running(t, config(t, f))
	for _, size := range lostSizes {
		d, _ := stored(t, s, size)
		wrong, err := d.Space().New(d.Hash(), d.Size()+1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Open(t.Context(), wrong, 0); !errors.Is(err, cas.ErrNotFound) {
			t.Errorf("Open of a wrong size: error %v, want %v", err, cas.ErrNotFound)
		}
		if len(missing(t, s, d)) != 0 {
			t.Error("the blob is forgotten")
		}
	}
}

// Asking again and again for what nobody has costs the others next to nothing.
func TestLossesAreAnnouncedSeldom(t *testing.T) {
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
	d, _ := castest.Blob(castest.Space(t, ""), 1000)
	began, reads := time.Now(), 0
	for ; reads < 300; reads++ {
		if _, err := s.Open(t.Context(), d, 0); !errors.Is(err, cas.ErrNotFound) {
			t.Fatalf("Open: error %v, want %v", err, cas.ErrNotFound)
		}
	}
	most := 1 + int(time.Since(began)/time.Second)
	last, _ := stored(t, s, 1) // is announced after the rest
	announced := 0
	for done := false; !done; {
		m, err := sub.NextMsg(5 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for records := m.Data[9:]; len(records) > 0; records = records[24:] {
			switch {
			case bytes.Equal(records[:16], keyBytes(t, d)):
				announced++
			case bytes.Equal(records[:16], keyBytes(t, last)):
				done = true
			}
		}
	}
	if announced == 0 || announced > most {
		t.Errorf("%d reads were announced %d times, want 1 to %d", reads, announced, most)
	}
}

// keyBytes is the key of a blob of the default space in announcements.
func keyBytes(t testing.TB, d digest.Digest) []byte {
	t.Helper()
	key, err := hex.DecodeString(d.Hash()[:32])
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// The broker comes back with an older state or with none, on the same port, and all stores know.
func TestIndexAfterBrokerLostData(t *testing.T) {
	dir, backup := t.TempDir(), t.TempDir()
	port := server.RANDOM_PORT
	start := func() *server.Server {
		t.Helper()
		s := startServer(t, func(o *server.Options) { o.StoreDir, o.Port = dir, port })
		port = s.Addr().(*net.TCPAddr).Port
		return s
	}
	stop := func(s *server.Server) {
		s.Shutdown()
		s.WaitForShutdown()
	}
	replace := func(to, from string) {
		t.Helper()
		if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(to, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
	}
	s := start()
	config := func() objectstore.Config {
		connect := func() *nats.Conn {
			nc, err := nats.Connect(s.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 0))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(nc.Close)
			return nc
		}
		return objectstore.Config{Small: connect(), Bulk: connect(), Log: quiet(), RequestTimeout: time.Second}
	}
	a, b := running(t, config()), running(t, config())
	type blob struct {
		digest digest.Digest
		data   []byte
	}
	var old, fresh []blob
	fill := func(blobs *[]blob) {
		t.Helper()
		for _, size := range lostSizes {
			d, data := castest.Blob(castest.Space(t, ""), size)
			eventually(t, "Put", func() bool { return a.Put(t.Context(), d, bytes.NewReader(data)) == nil })
			eventually(t, "the blob is known", func() bool { return len(missing(t, b, d)) == 0 })
			*blobs = append(*blobs, blob{d, data})
		}
	}
	knows := func(s cas.Store, lost, kept []blob) bool {
		for _, l := range lost {
			if len(missing(t, s, l.digest)) == 0 {
				return false
			}
		}
		for _, k := range kept {
			if len(missing(t, s, k.digest)) != 0 {
				return false
			}
		}
		return true
	}

	fill(&old)
	stop(s)
	replace(backup, dir)
	s = start()
	fill(&fresh)
	stop(s)
	replace(dir, backup)
	s = start()
	for _, store := range []cas.Store{a, b} {
		eventually(t, "the index is that of the older state", func() bool { return knows(store, fresh, old) })
	}
	for _, l := range fresh {
		wantAgain(t, a, b, l.digest, l.data)
	}

	stop(s)
	replace(dir, t.TempDir())
	start()
	for _, store := range []cas.Store{a, b} {
		eventually(t, "the index is empty", func() bool { return knows(store, append(old, fresh...), nil) })
	}
	for _, l := range append(old, fresh...) {
		wantAgain(t, b, a, l.digest, l.data)
	}
}

// A listing drops what was there before it began and is not listed, and nothing else.
func TestListingKeepsWhatIsStoredMeanwhile(t *testing.T) {
	f := brokertest.Start(t)
	s, other := running(t, config(t, f)), running(t, config(t, f))
	for _, size := range lostSizes {
		before, _ := stored(t, s, size)
		read, data := stored(t, s, size)
		var mine, others digest.Digest
		s.Sweep(func() {
			mine, _ = stored(t, s, size)
			others, _ = stored(t, other, size)
			eventually(t, "the blob is announced", func() bool { return len(missing(t, s, others)) == 0 })
			if got, err := cas.ReadAll(t.Context(), s, read, read.Size()); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, error %v", len(got), err)
			}
		})
		if got := missing(t, s, before, read, mine, others); len(got) != 1 || got[0] != before {
			t.Errorf("missing %v, want %v", got, before)
		}
	}
}

// Listings beside writers lose nothing.
func TestListingsBesidePuts(t *testing.T) {
	f := brokertest.Start(t)
	s := running(t, config(t, f))
	var writers, lister sync.WaitGroup
	done := make(chan struct{})
	lister.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if err := s.Refresh(t.Context()); err != nil {
				t.Errorf("Refresh: %v", err)
				return
			}
		}
	})
	ds := make([][]digest.Digest, 4)
	for i := range ds {
		writers.Go(func() {
			for n := range 100 {
				size := 100 + n
				if n%20 == 0 {
					size = 600 << 10
				}
				d, data := castest.Blob(castest.Space(t, ""), size)
				if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
					t.Errorf("Put: %v", err)
				}
				ds[i] = append(ds[i], d)
				if got := missing(t, s, ds[i]...); len(got) != 0 {
					t.Errorf("%d blobs are missing beside a listing", len(got))
				}
			}
		})
	}
	writers.Wait()
	close(done)
	lister.Wait()
}

// Streams that someone deletes under a running store are made again, and what they held is forgotten.
func TestDeletedStreamsAreMadeAgain(t *testing.T) {
	f := brokertest.Start(t)
	cfg := config(t, f)
	cfg.Log = quiet()
	s := running(t, cfg)
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	var ds []digest.Digest
	var contents [][]byte
	for _, size := range lostSizes {
		d, data := stored(t, s, size)
		ds, contents = append(ds, d), append(contents, data)
	}
	for _, stream := range []string{smallStream, largeStream} {
		if err := js.DeleteStream(t.Context(), stream); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Open(t.Context(), ds[0], 0); !errors.Is(err, cas.ErrUnavailable) {
		t.Errorf("Open without a stream: error %v, want %v", err, cas.ErrUnavailable)
	}
	eventually(t, "the blobs are forgotten", func() bool { return len(missing(t, s, ds...)) == len(ds) })
	for i, d := range ds {
		wantAgain(t, s, s, d, contents[i])
	}
}

// An old generation that is deleted is dropped whole, and no read asks for it any more.
func TestDeletedGenerationIsDropped(t *testing.T) {
	f := brokertest.Start(t)
	first := open(t, config(t, f))
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	var old, fresh []digest.Digest
	for _, size := range lostSizes {
		d, _ := stored(t, first, size)
		old = append(old, d)
	}
	for _, bucket := range []string{"cas-s-2-0", "cas-l-2-0"} {
		_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
			Name: "OBJ_" + bucket, Subjects: []string{"$O." + bucket + ".C.>", "$O." + bucket + ".M.>"}, AllowDirect: true,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	cfg := config(t, f)
	s := running(t, cfg)
	for _, size := range lostSizes {
		d, _ := stored(t, s, size)
		fresh = append(fresh, d)
	}
	if got := missing(t, s, append(old, fresh...)...); len(got) != 0 {
		t.Fatalf("missing %v before the deletion", got)
	}
	for _, stream := range []string{smallStream, largeStream} {
		if err := js.DeleteStream(t.Context(), stream); err != nil {
			t.Fatal(err)
		}
	}
	if err := cfg.Small.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old generation is forgotten", func() bool { return len(missing(t, s, old...)) == len(old) })
	if got := missing(t, s, fresh...); len(got) != 0 {
		t.Errorf("missing %v of the generation that lives", got)
	}
	for _, d := range old {
		if _, err := s.Open(t.Context(), d, 0); !errors.Is(err, cas.ErrNotFound) {
			t.Errorf("Open: error %v, want %v", err, cas.ErrNotFound)
		}
	}
}
