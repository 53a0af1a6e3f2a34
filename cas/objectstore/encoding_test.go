package objectstore_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

func compressing(t testing.TB, f *brokertest.Farm, mode objectstore.Compression) objectstore.Config {
	t.Helper()
	cfg := config(t, f)
	cfg.Compression = mode
	return cfg
}

func TestConformanceOfCompression(t *testing.T) {
	for _, mode := range objectstore.Compressions() {
		t.Run(string(mode), func(t *testing.T) {
			start := func(t testing.TB) cas.Store {
				t.Helper()
				return running(t, compressing(t, brokertest.Start(t), mode))
			}
			t.Run("Frames", func(t *testing.T) { castest.RunFrames(t, start) })
			t.Run("Resumer", func(t *testing.T) { castest.RunResumer(t, start) })
			if mode == objectstore.CompressAll {
				t.Run("Store", func(t *testing.T) { castest.Run(t, start) })
			}
		})
	}
}

// text compresses well, noise does not, and half of every chunk of a mixture does.
func content(t testing.TB, kind string, size int) []byte {
	t.Helper()
	noise := make([]byte, size)
	rand.Read(noise)
	switch kind {
	case "noise":
	case "text":
		for i := range noise {
			noise[i] = "eta\n"[noise[i]&3]
		}
	case "mixture":
		for i := range noise {
			if i>>18&1 == 0 {
				noise[i] = byte(i)
			}
		}
	case "noise, then zeros":
		clear(noise[size/2:])
	case "zeros, then noise":
		clear(noise[:size/2])
	}
	return noise
}

// What one mode stores is read by all others, whole and from everywhere, as bytes and as frames.
func TestCompressedBlobs(t *testing.T) {
	f := brokertest.Start(t)
	space := castest.Space(t, "compression")
	reader := open(t, config(t, f))
	for _, mode := range objectstore.Compressions() {
		s := open(t, compressing(t, f, mode))
		for _, kind := range []string{"noise", "text", "mixture", "noise, then zeros", "zeros, then noise"} {
			for _, size := range []int{100, 4 << 10, 100 << 10, 512 << 10, 512<<10 + 1, 1 << 20, 1<<20 + 77} {
				data := content(t, kind, size)
				d := space.Of(data)
				if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
					t.Fatalf("%s, %s, %d bytes: %v", mode, kind, size, err)
				}
				wantBlob(t, reader, d, data)
				for _, offset := range []int{0, 1, size / 2, chunk, chunk + 1, size - 1, size} {
					if offset > size {
						continue
					}
					what := fmt.Sprintf("%s, %s, %d bytes from %d", mode, kind, size, offset)
					r, err := reader.Open(t.Context(), d, int64(offset))
					wantRead(t, what, r, err, data[offset:])
					r, err = reader.OpenFrames(t.Context(), d, int64(offset))
					if err != nil {
						t.Errorf("%s: OpenFrames: %v", what, err)
						continue
					}
					z := compress.NewReader(r, int64(size-offset))
					wantRead(t, what+", frames", z, nil, data[offset:])
					r.Close()
				}
			}
		}
	}
}

func wantRead(t *testing.T, what string, r io.ReadCloser, err error, want []byte) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes, want %d, error %v", what, len(got), len(want), err)
	}
}

// Stock clients check the SHA-256 of what is stored, whatever the digest function of the blob. Of a
// compressed blob they get a zstd stream, and the metadata says so.
func TestStockClientReadsAllForms(t *testing.T) {
	f := brokertest.Start(t)
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []objectstore.Compression{objectstore.CompressNothing, objectstore.CompressAll} {
		s := open(t, compressing(t, f, mode))
		for _, function := range digest.Functions() {
			space, err := digest.SpaceOf("stock/"+string(mode), function.Proto(), "")
			if err != nil {
				t.Fatal(err)
			}
			for bucket, size := range map[string]int{"cas-s-1-0": 20 << 10, "cas-l-1-0": 2<<20 + 5} {
				for _, kind := range []string{"noise", "text"} {
					what := fmt.Sprintf("%s, %v, %s of %d bytes", mode, function, kind, size)
					data := content(t, kind, size)
					d := space.Of(data)
					if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					stock, err := js.ObjectStore(t.Context(), bucket)
					if err != nil {
						t.Fatal(err)
					}
					info, err := stock.GetInfo(t.Context(), d.String())
					if err != nil {
						t.Errorf("%s: GetInfo: %v", what, err)
						continue
					}
					got, err := stock.GetBytes(t.Context(), d.String())
					if err != nil || int(info.Size) != len(got) {
						t.Errorf("%s: GetBytes: %d bytes, metadata says %d, error %v", what, len(got), info.Size, err)
					}
					compressed := mode == objectstore.CompressAll && kind == "text"
					if (info.Headers.Get("Jetfarm-Encoding") == "zstd") != compressed {
						t.Errorf("%s: headers %v", what, info.Headers)
					}
					if compressed {
						if len(got) > size*4/5 {
							t.Errorf("%s: %d bytes are stored", what, len(got))
						}
						got, err = compress.Decode(nil, got, int64(size))
					}
					if err != nil || !bytes.Equal(got, data) {
						t.Errorf("%s: %d bytes, error %v", what, len(got), err)
					}
				}
			}
		}
	}
}

// A large blob whose bytes come slowly is compressed in the meantime.
func TestSlowUploadIsCompressed(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, compressing(t, f, objectstore.CompressAuto))
	data := content(t, "text", 8*chunk)
	d := castest.Space(t, "slow").Of(data)
	source := bytes.NewReader(data)
	err := s.Put(t.Context(), d, readerFunc(func(p []byte) (int, error) {
		timer := time.NewTimer(3 * time.Millisecond) // a slow client
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-t.Context().Done():
		}
		return source.Read(p)
	}))
	if err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, d, data)
	if got := streamState(t, f.Connect(t), largeStream).Bytes; got > uint64(len(data))*4/5 {
		t.Errorf("%d bytes are stored of %d", got, len(data))
	}
}

// Compressed copies that are damaged, in every way, are neither delivered as bytes nor as frames.
func TestDamagedCompressedBlob(t *testing.T) {
	damage := map[string]func(m *jetstream.RawStreamMsg){
		"bytes":       func(m *jetstream.RawStreamMsg) { m.Data[len(m.Data)/2] ^= 4 },
		"end":         func(m *jetstream.RawStreamMsg) { m.Data = m.Data[:len(m.Data)-1] },
		"encoding":    func(m *jetstream.RawStreamMsg) { m.Header.Set("Jetfarm-Encoding", "lzma") },
		"no encoding": func(m *jetstream.RawStreamMsg) { m.Header.Del("Jetfarm-Encoding") },
		"other bytes": func(m *jetstream.RawStreamMsg) { m.Data = compress.Append(nil, make([]byte, 100<<10)) },
	}
	for name, change := range damage {
		for stream, size := range map[string]int{smallStream: 100 << 10, largeStream: 5*chunk + 9} {
			for _, frames := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%d/frames=%t", name, size, frames), func(t *testing.T) {
					f := brokertest.Start(t)
					cfg := compressing(t, f, objectstore.CompressAll)
					cfg.Log = quiet()
					s := open(t, cfg)
					data := content(t, "text", size)
					d := castest.Space(t, "damage").Of(data)
					if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
						t.Fatal(err)
					}
					damageOne(t, f, stream, change)
					openAs := s.Open
					if frames {
						openAs = s.OpenFrames
					}
					got, err := readWith(t.Context(), openAs, d)
					if !errors.Is(err, cas.ErrMismatch) {
						t.Errorf("%d bytes were read, error %v, want %v", got, err, cas.ErrMismatch)
					}
					if len(missing(t, s, d)) != 1 {
						t.Error("the damaged blob is present")
					}
				})
			}
		}
	}
}

func readWith(ctx context.Context, open func(context.Context, digest.Digest, int64) (io.ReadCloser, error), d digest.Digest) (int64, error) {
	r, err := open(ctx, d, 0)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(io.Discard, r)
	return n, errors.Join(err, r.Close())
}

// damageOne changes the second chunk, or the only one, in the place where it is.
func damageOne(t *testing.T, f *brokertest.Farm, stream string, change func(m *jetstream.RawStreamMsg)) {
	t.Helper()
	republish(t, f, stream, func(all []*jetstream.RawStreamMsg) []*jetstream.RawStreamMsg {
		change(all[1]) // metadata is the first message of a small blob, and the last of a large one
		if stream == largeStream {
			// The positions of the chunks have moved.
			meta := all[len(all)-1]
			first := fmt.Appendf(nil, `"jetfarm-chunks":"%d,`, len(all)+1)
			meta.Data = bytes.Replace(meta.Data, []byte(`"jetfarm-chunks":"1,`), first, 1)
		}
		return all
	})
}
