package objectstore_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

var benchSizes = []struct {
	name string
	size int
}{{"1KiB", 1 << 10}, {"16KiB", 16 << 10}, {"512KiB", 512 << 10}, {"64MiB", 64 << 20}}

// inProcess connects to the farm's server without a socket.
func inProcess(t testing.TB, f *brokertest.Farm) *nats.Conn {
	t.Helper()
	nc, err := broker.Connect(t.Context(), broker.ConnectConfig{Embedded: f.Server, Name: t.Name(), Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func benchStore(b *testing.B) (*objectstore.Store, *brokertest.Farm) {
	b.Helper()
	f := brokertest.Start(b)
	return running(b, objectstore.Config{Small: inProcess(b, f), Bulk: inProcess(b, f), Log: logger(b)}), f
}

// variant changes data so that it has not been stored before.
func variant(space digest.Space, data []byte, n int) digest.Digest {
	binary.LittleEndian.PutUint64(data, uint64(n))
	return space.Of(data)
}

func BenchmarkPut(b *testing.B) {
	for _, bench := range benchSizes {
		b.Run(bench.name, func(b *testing.B) {
			s, f := benchStore(b)
			space := castest.Space(b, "")
			_, data := castest.Blob(space, bench.size)
			b.SetBytes(int64(bench.size))
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				isLarge := bench.size > 1<<20
				if isLarge {
					b.StopTimer() // stopping takes longer than a small Put
				}
				d := variant(space, data, n)
				if n++; isLarge && n%16 == 0 {
					f.Purge(b, "OBJ_cas-l-1-0")
				}
				if isLarge {
					b.StartTimer()
				}
				if err := s.Put(b.Context(), d, bytes.NewReader(data)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkGet(b *testing.B) {
	for _, bench := range benchSizes {
		b.Run(bench.name, func(b *testing.B) {
			s, _ := benchStore(b)
			space := castest.Space(b, "")
			_, data := castest.Blob(space, bench.size)
			var ds []digest.Digest
			for n := range max(1, min(1000, 64<<20/bench.size)) {
				d := variant(space, data, n)
				if err := s.Put(b.Context(), d, bytes.NewReader(data)); err != nil {
					b.Fatal(err)
				}
				ds = append(ds, d)
			}
			b.SetBytes(int64(bench.size))
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				r, err := s.Open(b.Context(), ds[n%len(ds)], 0)
				if err != nil {
					b.Fatal(err)
				}
				if got, err := io.Copy(io.Discard, r); err != nil || got != int64(bench.size) {
					b.Fatalf("%d bytes, error %v", got, err)
				}
				if err := r.Close(); err != nil {
					b.Fatal(err)
				}
				n++
			}
		})
	}
}

// cpuTime is what this process has used, which other load on the machine changes less than the time.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// A batch as a frontend stores and reads it.
func BenchmarkBatch(b *testing.B) {
	const blobs, size, width = 1000, 1 << 10, 32
	s, _ := benchStore(b)
	oneByOne := struct{ cas.Store }{s}
	space := castest.Space(b, "")
	fresh := func() (ds []digest.Digest, data [][]byte) {
		for range blobs {
			d, blob := castest.Blob(space, size)
			ds, data = append(ds, d), append(data, blob)
		}
		return ds, data
	}
	check := func(b *testing.B, errs []error) {
		b.Helper()
		if err := errors.Join(errs...); err != nil {
			b.Fatal(err)
		}
	}
	report := func(b *testing.B, used time.Duration) {
		b.Helper()
		b.ReportMetric(float64(used.Microseconds())/float64(b.N*blobs), "cpu-us/blob")
	}
	for name, store := range map[string]cas.Store{"Batch": s, "OneByOne": oneByOne} {
		b.Run("Put1000x1KiB/"+name, func(b *testing.B) {
			b.ReportAllocs()
			var used time.Duration
			for b.Loop() {
				b.StopTimer()
				ds, data := fresh()
				before := cpuTime(b)
				b.StartTimer()
				check(b, cas.PutBatch(b.Context(), store, width, ds, data))
				used += cpuTime(b) - before
			}
			report(b, used)
		})
		b.Run("Get1000x1KiB/"+name, func(b *testing.B) {
			ds, data := fresh()
			check(b, cas.PutBatch(b.Context(), store, width, ds, data))
			b.ReportAllocs()
			before := cpuTime(b)
			for b.Loop() {
				_, errs := cas.ReadBatch(b.Context(), store, width, ds)
				check(b, errs)
			}
			report(b, cpuTime(b)-before)
		})
	}
}

func BenchmarkParallel(b *testing.B) {
	space := castest.Space(b, "")
	b.Run("PutGet1KiB", func(b *testing.B) {
		s, _ := benchStore(b)
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				d, data := castest.Blob(space, 1<<10)
				if err := s.Put(b.Context(), d, bytes.NewReader(data)); err != nil {
					b.Error(err)
					return
				}
				r, err := s.Open(b.Context(), d, 0)
				if err != nil {
					b.Error(err)
					return
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Error(err)
				}
				r.Close()
			}
		})
	})
	b.Run("Missing100", func(b *testing.B) {
		s, _ := benchStore(b)
		ds := absentBlobs(b, 100)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := s.Missing(b.Context(), ds); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

func absentBlobs(t testing.TB, n int) []digest.Digest {
	t.Helper()
	space := castest.Space(t, "")
	ds := make([]digest.Digest, n)
	for i := range ds {
		ds[i] = space.Of(binary.LittleEndian.AppendUint64([]byte("absent"), uint64(i)))
	}
	return ds
}

func BenchmarkMissing(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprintf("Absent%d", n), func(b *testing.B) {
			s, _ := benchStore(b)
			ds := absentBlobs(b, n)
			for b.Loop() {
				missing, err := s.Missing(b.Context(), ds)
				if err != nil || len(missing) != n {
					b.Fatalf("%d missing, error %v", len(missing), err)
				}
			}
		})
		b.Run(fmt.Sprintf("Present%d", n), func(b *testing.B) {
			f := brokertest.Start(b)
			nc := inProcess(b, f)
			cfg := objectstore.Config{Small: nc, Bulk: nc, Log: logger(b)}
			open(b, cfg)
			ds := fillSmall(b, nc, n)
			s := open(b, cfg)
			for b.Loop() {
				missing, err := s.Missing(b.Context(), ds)
				if err != nil || len(missing) != 0 {
					b.Fatalf("%d missing, error %v", len(missing), err)
				}
			}
		})
	}
}

func BenchmarkOpenIndex(b *testing.B) {
	const blobs = 100_000
	f := brokertest.Start(b)
	nc := inProcess(b, f)
	cfg := objectstore.Config{Small: nc, Bulk: nc, Log: logger(b)}
	open(b, cfg)
	ds := fillSmall(b, nc, blobs)
	for b.Loop() {
		s := open(b, cfg)
		if missing, err := s.Missing(b.Context(), ds); err != nil || len(missing) != 0 {
			b.Fatalf("%d missing, error %v", len(missing), err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/blobs, "us/blob")
}

// fillSmall stores the chunks of n small blobs, without waiting for each.
func fillSmall(t testing.TB, nc *nats.Conn, n int) []digest.Digest {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	space := castest.Space(t, "")
	ds := make([]digest.Digest, n)
	for i := range ds {
		data := binary.LittleEndian.AppendUint64([]byte("present"), uint64(i))
		ds[i] = space.Of(data)
		subject := fmt.Sprintf("$O.cas-s-1-0.C.%s.sha256.%s-%d", ds[i].Hash()[:2], ds[i].Hash(), len(data))
		if _, err := js.PublishAsync(subject, data); err != nil {
			t.Fatal(err)
		}
		if i%2000 == 1999 || i == n-1 {
			<-js.PublishAsyncComplete()
		}
	}
	return ds
}

// What compression costs and saves, for content that compresses as outputs of a build do, and for
// content that does not.
func BenchmarkCompression(b *testing.B) {
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		b.Fatal(err)
	}
	noise := make([]byte, 64<<20)
	rand.Read(noise)
	kinds := map[string][]byte{"program": bytes.Repeat(program, len(noise)/len(program)+1), "noise": noise}
	for _, size := range []int{4 << 10, 16 << 10, 512 << 10, 64 << 20} {
		for kind, data := range kinds {
			for _, mode := range []objectstore.Compression{objectstore.CompressNothing, objectstore.CompressAuto, objectstore.CompressAll} {
				b.Run(fmt.Sprintf("%s/%d/%s", kind, size, mode), func(b *testing.B) {
					f := brokertest.Start(b)
					s := open(b, objectstore.Config{Small: inProcess(b, f), Bulk: inProcess(b, f), Log: logger(b), Compression: mode})
					space := castest.Space(b, "")
					blob := bytes.Clone(data[len(data)/2-size/2:][:size])
					b.SetBytes(int64(size))
					var used time.Duration
					n := 0
					for b.Loop() {
						b.StopTimer()
						if n++; size > 1<<20 && n%16 == 0 {
							f.Purge(b, largeStream)
						}
						d := variant(space, blob, n)
						before := cpuTime(b)
						b.StartTimer()
						if err := s.Put(b.Context(), d, bytes.NewReader(blob)); err != nil {
							b.Fatal(err)
						}
						used += cpuTime(b) - before
					}
					mib := float64(size) / (1 << 20)
					b.ReportMetric(float64(used.Microseconds())/float64(n)/mib/1000, "put-cpu-ms/MiB")
					b.StopTimer()
					d := variant(space, blob, n)
					before := cpuTime(b)
					began, reads := time.Now(), 0
					for ; reads < 20 || time.Since(began) < time.Second/2; reads++ {
						r, err := s.Open(b.Context(), d, 0)
						if err != nil {
							b.Fatal(err)
						}
						if _, err := io.Copy(io.Discard, r); err != nil {
							b.Fatal(err)
						}
						r.Close()
					}
					b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(reads)/mib/1000, "get-cpu-ms/MiB")
					b.ReportMetric(float64(reads)*mib/time.Since(began).Seconds(), "get-MiB/s")
				})
			}
		}
	}
}
