package compress_test

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/jetfarm/jetfarm/cas/compress"
)

// BenchmarkLevel compares the levels that Append could use, each with its ratio.
func BenchmarkLevel(b *testing.B) {
	for _, content := range []string{"object", "noise"} {
		for _, size := range []int{4 << 10, 512 << 10} {
			data := noise(size)
			if content == "object" {
				data = object(b, size)
			}
			for _, level := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression} {
				for _, crc := range []bool{true, false} {
					b.Run(fmt.Sprintf("%s/%d/%v/crc=%t", content, size, level, crc), func(b *testing.B) {
						e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level), zstd.WithWindowSize(1<<20), zstd.WithEncoderCRC(crc))
						if err != nil {
							b.Fatal(err)
						}
						var out []byte
						b.SetBytes(int64(size))
						for b.Loop() {
							out = e.EncodeAll(data, out[:0])
						}
						b.ReportMetric(float64(len(out))/float64(size), "ratio")
					})
				}
			}
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{1 << 10, 16 << 10, 512 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			data := object(b, size)
			var out []byte
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				out = compress.Append(out[:0], data)
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, size := range []int{1 << 10, 16 << 10, 512 << 10} {
		frame := compress.Append(nil, object(b, size))
		for name, room := range map[string]int{"just enough": size, "a little more": size + 64} {
			b.Run(fmt.Sprintf("%d/%s", size, name), func(b *testing.B) {
				dst := make([]byte, 0, room)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if _, err := compress.Decode(dst, frame, int64(size)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkReader(b *testing.B) {
	for _, size := range []int{1 << 10, 8 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			frame := encode(b, object(b, size))
			buffer := make([]byte, 512<<10)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				z := compress.NewReader(bytes.NewReader(frame), int64(size))
				if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, z, buffer); err != nil || n != int64(size) {
					b.Fatal(n, err)
				}
				if err := z.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWriter(b *testing.B) {
	data := object(b, 8<<20)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		w := compress.NewWriter(io.Discard)
		if _, err := w.Write(data); err != nil {
			b.Fatal(err)
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
