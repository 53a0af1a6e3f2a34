package compress_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/jetfarm/jetfarm/cas/compress"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noise does not compress.
func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b) //nolint:errcheck // It has none.
	return b
}

// object is n bytes of this program, which compresses as outputs of a build do.
func object(t testing.TB, n int) []byte {
	t.Helper()
	b, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	b = b[1<<20:]
	return bytes.Repeat(b, 1+n/len(b))[:n]
}

func contents(t testing.TB) map[string][]byte {
	t.Helper()
	return map[string][]byte{
		"empty": {}, "one byte": {7}, "text": bytes.Repeat([]byte("hello, world\n"), 100), "noise": noise(300_000),
		"zeros": make([]byte, 3<<20), "object": object(t, 1<<20+17), "chunk": object(t, 512<<10),
	}
}

// encode is a frame as another encoder makes it.
func encode(t testing.TB, data []byte, options ...zstd.EOption) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, append(options, zstd.WithEncoderConcurrency(1))...)
	if err != nil {
		t.Fatal(err)
	}
	_, errWrite := w.Write(data)
	if err := errors.Join(errWrite, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// skippable is a frame of n bytes that holds nothing.
func skippable(n int) []byte {
	return append([]byte{0x5a, 0x2a, 0x4d, 0x18, byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}, make([]byte, n)...)
}

// decode reads a stream to its end.
func decode(r io.Reader, limit int64) ([]byte, error) {
	z := compress.NewReader(r, limit)
	data, err := io.ReadAll(z)
	return data, errors.Join(err, z.Close())
}

func TestRoundTrip(t *testing.T) {
	for name, data := range contents(t) {
		t.Run(name, func(t *testing.T) {
			prefix := []byte("prefix")
			frame := compress.Append(bytes.Clone(prefix), data)
			if !bytes.HasPrefix(frame, prefix) {
				t.Fatal("Append does not append")
			}
			frame = frame[len(prefix):]
			if len(frame) == 0 || len(frame) > len(data)+64 {
				t.Errorf("a frame of %d bytes for %d", len(frame), len(data))
			}
			var stream bytes.Buffer
			w := compress.NewWriter(&stream)
			for rest := data; len(rest) > 0; rest = rest[min(len(rest), 10_000):] {
				if _, err := w.Write(rest[:min(len(rest), 10_000)]); err != nil {
					t.Fatalf("Write: %v", err)
				}
			}
			if err := errors.Join(w.Close(), w.Close()); err != nil {
				t.Fatalf("Close: %v", err)
			}
			if _, err := w.Write(data); err == nil {
				t.Error("a Write after Close succeeded")
			}
			for form, encoded := range map[string][]byte{
				"Append": frame, "NewWriter": stream.Bytes(), "best": encode(t, data, zstd.WithEncoderLevel(zstd.SpeedBestCompression)),
				"no checksum": encode(t, data, zstd.WithEncoderCRC(false)), "window of 8 MiB": encode(t, data, zstd.WithWindowSize(compress.MaxWindow)),
			} {
				size := int64(len(data))
				got, err := compress.Decode(bytes.Clone(prefix), encoded, size)
				if err != nil || !bytes.Equal(got, append(bytes.Clone(prefix), data...)) {
					t.Errorf("%s: Decode: %d bytes, %v", form, len(got), err)
				}
				if got, err := compress.Decode(make([]byte, 0, size), encoded, size); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: Decode into just enough: %d bytes, %v", form, len(got), err)
				}
				for _, limit := range []int64{size, size + 1, 1<<63 - 1} {
					if got, err := decode(bytes.NewReader(encoded), limit); err != nil || !bytes.Equal(got, data) {
						t.Errorf("%s: a Reader with limit %d: %d bytes, %v", form, limit, len(got), err)
					}
				}
				shapes := []func(io.Reader) io.Reader{iotest.HalfReader, iotest.DataErrReader}
				if len(encoded) < 100_000 {
					shapes = append(shapes, iotest.OneByteReader)
				}
				for _, shape := range shapes {
					if got, err := decode(shape(bytes.NewReader(encoded)), size); err != nil || !bytes.Equal(got, data) {
						t.Errorf("%s: a Reader of an odd source: %d bytes, %v", form, len(got), err)
					}
				}
				if len(data) == 0 {
					continue
				}
				if _, err := compress.Decode(nil, encoded, size-1); !errors.Is(err, compress.ErrTooLarge) && (form == "Append" || !errors.Is(err, compress.ErrInvalid)) {
					t.Errorf("%s: Decode of one byte less: %v", form, err)
				}
				if _, err := compress.Decode(nil, encoded, size+1); !errors.Is(err, compress.ErrInvalid) {
					t.Errorf("%s: Decode of one byte more: %v", form, err)
				}
				if got, err := decode(bytes.NewReader(encoded), size-1); !errors.Is(err, compress.ErrTooLarge) || !bytes.HasPrefix(data, got) || int64(len(got)) >= size {
					t.Errorf("%s: a Reader of one byte less: %d bytes, %v", form, len(got), err)
				}
			}
		})
	}
}

// Frames of any kind may follow each other; what is behind the last one is an error (rows ZST-1, ZST-4).
func TestFrames(t *testing.T) {
	a, b := object(t, 100_000), []byte("second")
	both := append(bytes.Clone(a), b...)
	fa, fb := compress.Append(nil, a), compress.Append(nil, b)
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for name, input := range map[string][]byte{
		"two frames": join(fa, fb), "an empty frame between": join(fa, compress.Append(nil, nil), fb),
		"skippable frames": join(skippable(0), fa, skippable(1000), skippable(5), fb, skippable(300_000)),
		"frames by others": join(encode(t, a, zstd.WithEncoderLevel(zstd.SpeedBetterCompression)), encode(t, b)),
	} {
		if got, err := decode(bytes.NewReader(input), int64(len(both))); err != nil || !bytes.Equal(got, both) {
			t.Errorf("%s: a Reader: %d bytes, %v", name, len(got), err)
		}
		if got, err := compress.Decode(nil, input, int64(len(both))); err != nil || !bytes.Equal(got, both) {
			t.Errorf("%s: Decode: %d bytes, %v", name, len(got), err)
		}
	}
	for name, input := range map[string][]byte{"nothing": nil, "only a skippable frame": skippable(10)} {
		got, err := decode(bytes.NewReader(input), 0)
		all, errAll := compress.Decode(nil, input, 0)
		if err != nil || errAll != nil || len(got)+len(all) != 0 {
			t.Errorf("%s: %d and %d bytes, %v, %v", name, len(got), len(all), err, errAll)
		}
	}
	large := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x70, 1 | 1<<3, 0, 0, 'x'} // a window of 16 MiB for one byte
	most := bytes.Clone(large)
	most[5] = 0x68
	if got, err := decode(bytes.NewReader(most), 1); err != nil || string(got) != "x" {
		t.Errorf("a window of 8 MiB: %q, %v", got, err)
	}
	single := compress.Append(nil, a)
	single = append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 1}, single[9:]...) // a segment of 16 MiB
	dictionary := encode(t, a, zstd.WithEncoderDictRaw(77, bytes.Repeat(b, 100)))
	flipped := bytes.Clone(fa)
	flipped[len(flipped)-1] ^= 1 // the checksum
	bad := map[string][]byte{
		"window": large, "one segment as large": single, "dictionary": dictionary, "checksum": flipped, "raw": a, "text": b,
		"dictionary behind a good frame": join(fa, dictionary), "window behind a good frame": join(fa, large),
		"gzip": {0x1f, 0x8b, 8, 0}, "reserved bit": {0x28, 0xb5, 0x2f, 0xfd, 0x28, 5},
	}
	for _, n := range []int{1, 2, 3, 4, 5, 100} {
		bad["garbage of "+string(rune('0'+n%10))] = join(fa, make([]byte, n))
	}
	for n := 1; n < len(fa); n += 1 + n/3 {
		bad["truncated to "+string(rune(n))] = fa[:n]
	}
	bad["truncated at the end"] = fa[:len(fa)-1]
	bad["truncated skippable"] = join(fa, skippable(100)[:50])
	bad["truncated skippable head"] = join(fa, skippable(100)[:6])
	for name, input := range bad {
		if got, err := decode(bytes.NewReader(input), 1<<20); !errors.Is(err, compress.ErrInvalid) {
			t.Errorf("%s: a Reader: %d bytes, %v", name, len(got), err)
		}
		if got, err := compress.Decode(nil, input, int64(len(a))); !errors.Is(err, compress.ErrInvalid) {
			t.Errorf("%s: Decode: %d bytes, %v", name, len(got), err)
		}
	}
}

// What comes out, and what goes in for it, is bounded (rows ZST-5, ZST-7, X-51, X-58).
func TestBombs(t *testing.T) {
	bomb := encode(t, make([]byte, 64<<20), zstd.WithWindowSize(compress.MaxWindow))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if got, err := decode(bytes.NewReader(bomb), 10); !errors.Is(err, compress.ErrTooLarge) || len(got) > 10 {
		t.Errorf("a bomb for 10 bytes: %d bytes, %v", len(got), err)
	}
	if _, err := compress.Decode(nil, bomb, 10); !errors.Is(err, compress.ErrTooLarge) && !errors.Is(err, compress.ErrInvalid) {
		t.Errorf("Decode of a bomb: %v", err)
	}
	z := compress.NewReader(bytes.NewReader(bomb), 64<<20)
	n, err := io.Copy(io.Discard, z)
	if err := errors.Join(err, z.Close()); err != nil || n != 64<<20 {
		t.Errorf("a bomb with an honest size: %d bytes, %v", n, err)
	}
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 3*compress.MaxWindow {
		t.Errorf("64 MiB were decoded with %d bytes of memory", took)
	}

	for name, frame := range map[string][]byte{"skippable": skippable(1 << 10), "empty": compress.Append(nil, nil), "skippable and empty": skippable(0)} {
		source := &endless{frame: frame}
		if got, err := decode(source, 10); !errors.Is(err, compress.ErrInvalid) || len(got) != 0 {
			t.Errorf("endless %s frames: %d bytes, %v", name, len(got), err)
		}
		if source.read > 2<<20 {
			t.Errorf("endless %s frames: %d bytes were read", name, source.read)
		}
	}
	// Even a frame for each byte is within the bound of what goes in.
	var tiny []byte
	for range 50_000 {
		tiny = compress.Append(tiny, []byte{1})
	}
	if got, err := decode(bytes.NewReader(tiny), 50_000); err != nil || len(got) != 50_000 {
		t.Errorf("50 000 frames of one byte, %d together: %d bytes, %v", len(tiny), len(got), err)
	}
}

// endless repeats a frame.
type endless struct {
	frame  []byte
	unread []byte
	read   int
}

func (e *endless) Read(p []byte) (int, error) {
	if len(e.unread) == 0 {
		e.unread = e.frame
	}
	n := copy(p, e.unread)
	e.unread = e.unread[n:]
	e.read += n
	return n, nil
}

// An error underneath comes through as it is, also where the decoder takes it for an end.
func TestErrorsUnderneath(t *testing.T) {
	data := object(t, 300_000)
	frame := compress.Append(nil, data)
	for _, fail := range []error{errors.New("the source failed"), io.ErrUnexpectedEOF} {
		for _, n := range []int{0, 1, 3, 4, 100, len(frame) / 2, len(frame) - 1, len(frame)} {
			z := compress.NewReader(io.MultiReader(bytes.NewReader(frame[:n]), iotest.ErrReader(fail)), int64(len(data)))
			for range 2 {
				if _, err := io.Copy(io.Discard, z); err != fail { //nolint:errorlint // As it is.
					t.Fatalf("after %d of %d bytes: error %v, want %v", n, len(frame), err, fail)
				}
			}
			if err := errors.Join(z.Close(), z.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
	broken := errors.New("the sink failed")
	w := compress.NewWriter(failing{broken})
	_, errWrite := w.Write(noise(5 << 20))
	if err := errors.Join(errWrite, w.Close()); !errors.Is(err, broken) {
		t.Errorf("a Writer to a sink that fails: %v", err)
	}
	if got, err := decode(bytes.NewReader(frame), int64(len(data))); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the next one: %d bytes, %v", len(got), err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// A reader that is closed early gives its decoder back in order.
func TestCloseEarly(t *testing.T) {
	data := object(t, 1<<20)
	frame := compress.Append(nil, data)
	for range 20 {
		z := compress.NewReader(bytes.NewReader(frame), int64(len(data)))
		if _, err := io.ReadFull(z, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		if n, err := z.Read(make([]byte, 1)); err == nil || n != 0 {
			t.Errorf("a closed reader returns %d bytes", n)
		}
		if got, err := decode(bytes.NewReader(frame), int64(len(data))); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("the next one: %d bytes, %v", len(got), err)
		}
	}
}

// FuzzReader: Reader and Decode agree on every input and stay within their bounds.
func FuzzReader(f *testing.F) {
	small := []byte("hello, world; hello, farm")
	frame := compress.Append(nil, small)
	f.Add(frame, len(small))
	f.Add(append(bytes.Clone(frame), frame...), 2*len(small))
	f.Add(append(skippable(3), frame...), len(small))
	f.Add(encode(f, make([]byte, 1<<17), zstd.WithWindowSize(1<<20)), 100)
	f.Add(encode(f, object(f, 5000), zstd.WithEncoderCRC(false)), 5000)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, input []byte, limit int) {
		if limit < 0 || limit > 1<<20 {
			return
		}
		got, err := decode(iotest.HalfReader(bytes.NewReader(input)), int64(limit))
		if len(got) > limit || (err != nil && !errors.Is(err, compress.ErrInvalid) && !errors.Is(err, compress.ErrTooLarge)) {
			t.Fatalf("a Reader: %d bytes, %v", len(got), err)
		}
		all, errAll := compress.Decode(nil, input, int64(limit))
		if errAll != nil && !errors.Is(errAll, compress.ErrInvalid) && !errors.Is(errAll, compress.ErrTooLarge) {
			t.Fatalf("Decode: %v", errAll)
		}
		if whole := err == nil && len(got) == limit; whole != (errAll == nil) || (whole && !bytes.Equal(got, all)) {
			t.Errorf("a Reader: %d bytes, %v; Decode of %d: %d bytes, %v", len(got), err, limit, len(all), errAll)
		}
		again, err := compress.Decode(nil, compress.Append(nil, input), int64(len(input)))
		if err != nil || !bytes.Equal(again, input) {
			t.Errorf("%d bytes there and back: %d bytes, %v", len(input), len(again), err)
		}
	})
}
