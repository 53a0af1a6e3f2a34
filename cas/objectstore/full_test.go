package objectstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// smallDisk mounts a file system of some size that goes with the test.
func smallDisk(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size))
	if errors.Is(err, unix.EPERM) {
		t.Skip("only root may mount a small disk")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount the small disk: %v", err)
		}
	})
	return dir
}

// telling has a server tell how much room it has, as its process does.
func telling(t *testing.T, s *server.Server, dir string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	nc := connect(t, s)
	var group sync.WaitGroup
	group.Go(func() {
		err := objectstore.TellDisk(ctx, nc, func() (objectstore.Disk, error) {
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil {
				return objectstore.Disk{}, err
			}
			js, err := s.Jsz(nil)
			if err != nil {
				return objectstore.Disk{}, err
			}
			return objectstore.Disk{
				Server: s.Name(), Free: int64(fs.Bavail) * fs.Bsize, Total: int64(fs.Blocks) * fs.Bsize,
				Max: s.JetStreamConfig().MaxStore, Used: int64(js.Store),
			}, nil
		})
		if err != nil {
			t.Errorf("TellDisk: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		group.Wait()
	})
}

// A budget larger than the disk: what is oldest gives way before the disk is full. When others fill it,
// uploads are refused, and taken again once there is room.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	const disk = 96 << 20
	dir := smallDisk(t, disk)
	srv := startServer(t, func(o *server.Options) { o.StoreDir, o.JetStreamMaxStore = dir, 1<<40 })
	telling(t, srv, dir)
	cfg := objectstore.Config{Small: connect(t, srv), Bulk: connect(t, srv), Log: quiet(), Maintain: true, MaxSize: 1 << 40}
	s := running(t, cfg)
	eventually(t, "the limit is that of the disk", func() bool {
		u, err := s.Usage(t.Context())
		return err == nil && u.Limit > 0 && u.Limit < disk
	})
	first := put(t, s, 1000)
	for written := 0; written < disk*3/2; written += 900 << 10 {
		k := put(t, s, 900<<10)
		checkRead(t, s, k)
	}
	if got := missing(t, s, first.digest); len(got) != 1 {
		t.Error("the first blob outlives the disk")
	}

	// Others take what the store gives back, until it has nothing more to give.
	fat, err := os.Create(filepath.Join(dir, "fat"))
	if err != nil {
		t.Fatal(err)
	}
	defer fat.Close()
	eventually(t, "the store is full", func() bool {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}
		if _, err := fat.Write(make([]byte, max(0, int64(fs.Bavail)*fs.Bsize-(1<<20)))); err != nil {
			t.Fatal(err)
		}
		return errors.Is(s.Full(), cas.ErrFull)
	})
	d, data := castest.Blob(castest.Space(t, ""), 1000)
	if err := s.Put(t.Context(), d, bytes.NewReader(data)); !errors.Is(err, cas.ErrFull) || !strings.Contains(err.Error(), "disk") {
		t.Errorf("Put on a full disk: error %v, want %v that names the disk", err, cas.ErrFull)
	}
	if err := fat.Truncate(0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the store recovers", func() bool { return s.Full() == nil })
	wantAgain(t, s, s, d, data)
}

// A broker that refuses to store more and has told nobody its limit gets room, too.
func TestBrokerRefuses(t *testing.T) {
	t.Parallel()
	const room = 32 << 20
	srv := startServer(t, func(o *server.Options) { o.JetStreamMaxStore = room })
	s := running(t, objectstore.Config{Small: connect(t, srv), Bulk: connect(t, srv), Log: quiet(), Maintain: true})
	eventually(t, "somebody rotates", func() bool { return s.Rotates(t.Context()) })
	write := func() error {
		d, data := castest.Blob(castest.Space(t, ""), 400<<10)
		return s.Put(t.Context(), d, bytes.NewReader(data))
	}
	var err error
	for written := 0; err == nil && written < 2*room; written += 400 << 10 {
		err = write()
	}
	if !errors.Is(err, cas.ErrFull) {
		t.Fatalf("Put into a full broker: error %v, want %v", err, cas.ErrFull)
	}
	eventually(t, "there is room again", func() bool { return write() == nil })
	refused := 0
	for written := 0; written < 4*room; written += 400 << 10 {
		if err := write(); errors.Is(err, cas.ErrFull) {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if refused > 10 {
		t.Errorf("%d puts were refused after the limit was known", refused)
	}
	eventually(t, "the store is not full", func() bool { return s.Full() == nil })
}

// Chunks that no metadata names go when nothing was added to them for long enough, and nothing else.
func TestOrphansArePurged(t *testing.T) {
	t.Parallel()
	f := brokertest.Start(t)
	for _, age := range []time.Duration{time.Hour, time.Nanosecond} {
		cfg := config(t, f)
		cfg.Maintain, cfg.OrphanAge = true, age
		s := open(t, cfg)
		whole := put(t, s, 3<<20)
		broken, data := castest.Blob(castest.Space(t, ""), 3<<20)
		cut := io.MultiReader(bytes.NewReader(data[:2<<20]), iotest.ErrReader(errors.New("gone")))
		if err := s.PutFrom(t.Context(), broken, "upload", 0, cut); err == nil {
			t.Fatal("an upload that broke off is stored")
		}
		kept, err := s.Committed(t.Context(), broken, "upload")
		if err != nil || kept == 0 {
			t.Fatalf("%d bytes of the upload are kept, error %v", kept, err)
		}
		if err := s.Clean(t.Context()); err != nil {
			t.Fatal(err)
		}
		left, err := s.Committed(t.Context(), broken, "upload")
		if want := map[bool]int64{true: kept, false: 0}[age == time.Hour]; err != nil || left != want {
			t.Errorf("age %v: %d bytes are kept after the sweep, error %v, want %d", age, left, err, want)
		}
		checkRead(t, s, whole)
		wantAgain(t, s, s, broken, data)
	}
}

// A read goes on where its blob was copied to when its generation is dropped, in whatever form it is
// stored here and there.
func TestReadGoesOnInAnotherGeneration(t *testing.T) {
	t.Parallel()
	const budget = 48 << 20
	for _, first := range []objectstore.Compression{objectstore.CompressNothing, objectstore.CompressAll} {
		t.Run(string(first), func(t *testing.T) {
			t.Parallel()
			f := brokertest.Start(t)
			cfg := limited(t, f, budget)
			cfg.Compression = objectstore.CompressAll
			s := rotating(t, cfg)
			cfg = config(t, f)
			cfg.Compression = first
			data := content(t, "text", 6<<20+1)
			k := kept{castest.Space(t, "").Of(data), data}
			if err := running(t, cfg).Put(t.Context(), k.digest, bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
			plain, err := s.Open(t.Context(), k.digest, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer plain.Close()
			frames, err := s.OpenFrames(t.Context(), k.digest, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer frames.Close()
			begun := make([]byte, 1<<20)
			if _, err := io.ReadFull(plain, begun); err != nil {
				t.Fatal(err)
			}
			begunFrames := make([]byte, 1000)
			if _, err := io.ReadFull(frames, begunFrames); err != nil {
				t.Fatal(err)
			}
			js := newJetStream(t, f.Connect(t))
			for range 1000 {
				if _, there := streams(t, js)["OBJ_cas-l-1-0"]; !there {
					break
				}
				put(t, s, 1<<20)
				if got := missing(t, s, k.digest); len(got) != 0 {
					t.Fatal("a blob that is asked for is gone")
				}
			}
			wantRead(t, "plain", readOn(begun, plain), nil, data)
			z := compress.NewReader(readOn(begunFrames, frames), int64(len(data)))
			wantRead(t, "frames", z, nil, data)
		})
	}
}

// readOn reads on after what was read.
func readOn(begun []byte, r io.ReadCloser) io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(begun), r), r}
}

// A read that is going on when its generation is dropped may have to be repeated, when it did not move for
// as long as it took to fill the store, but the blob does not count as damaged.
func TestReadOfDroppedGeneration(t *testing.T) {
	t.Parallel()
	const budget = 64 << 20
	f := brokertest.Start(t)
	s := rotating(t, limited(t, f, budget))
	k := put(t, s, 16<<20)
	r, err := s.Open(t.Context(), k.digest, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	for s.GenerationOf(k.digest) != 0 {
		put(t, s, 2<<20)
	}
	eventually(t, "the streams are deleted", func() bool {
		_, there := streams(t, newJetStream(t, f.Connect(t)))["OBJ_cas-l-1-0"]
		return !there
	})
	if _, err := io.Copy(io.Discard, r); err != nil && !errors.Is(err, cas.ErrUnavailable) {
		t.Errorf("read of a dropped generation: error %v, want none or %v", err, cas.ErrUnavailable)
	}
	// It is gone, unless it was copied forward because it was being read: then it is whole.
	again, err := s.Open(t.Context(), k.digest, 0)
	if errors.Is(err, cas.ErrNotFound) {
		return
	}
	if err != nil {
		t.Fatalf("Open: error %v, want none or %v", err, cas.ErrNotFound)
	}
	defer again.Close()
	if n, err := io.Copy(io.Discard, again); err != nil || n != 16<<20 {
		t.Errorf("read of what was copied forward: %d bytes, %v", n, err)
	}
}

// Three brokers that replicate, with a store at two of them.
func TestRotationInCluster(t *testing.T) {
	t.Parallel()
	const budget = 64 << 20
	servers := startCluster(t)
	config := func(s *server.Server) objectstore.Config {
		return objectstore.Config{Small: connect(t, s), Bulk: connect(t, s), Replicas: 3, Log: quiet(), Maintain: true, MaxSize: budget}
	}
	eventually(t, "the cluster has a leader", func() bool {
		_, err := objectstore.Open(t.Context(), config(servers[0]))
		return err == nil
	})
	stores := []*objectstore.Store{running(t, config(servers[0])), running(t, config(servers[1]))}
	eventually(t, "one of them rotates", func() bool { return stores[0].Rotates(t.Context()) || stores[1].Rotates(t.Context()) })
	hot := put(t, stores[0], 50_000)
	js, err := jetstream.New(connect(t, servers[2]))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 * budget >> 20 {
		s := stores[i%2]
		k := put(t, s, 1<<20)
		if got := missing(t, s, hot.digest); i > 0 && len(got) > 0 {
			t.Errorf("the hot blob is missing after %d MiB", i)
		}
		checkRead(t, s, k)
	}
	checkRead(t, stores[1], hot)
	if got := totalBytes(t, js); got > budget+budget/10 {
		t.Errorf("%d bytes, want at most %d", got, budget+budget/10)
	}
}
