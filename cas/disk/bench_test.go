package disk_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/jetfarm/jetfarm/cas/castest"
)

// BenchmarkLinkWarm is a link of a blob that is held, without the unlink that makes room for the
// next. Compare it with BenchmarkLinkFloor.
func BenchmarkLinkWarm(b *testing.B) {
	x := start(b, 64<<20)
	d, data := x.blob(b, 10000)
	x.link(b, d, false, data)
	dst := filepath.Join(x.out, "link")
	b.ReportAllocs()
	for b.Loop() {
		if err := x.Link(b.Context(), d, false, dst); err != nil {
			b.Fatal(err)
		}
		if err := os.Remove(dst); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLinkFloor is what the two system calls of BenchmarkLinkWarm cost.
func BenchmarkLinkFloor(b *testing.B) {
	dir := b.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	if err := os.WriteFile(src, []byte("data"), 0o600); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := os.Link(src, dst); err != nil {
			b.Fatal(err)
		}
		if err := os.Remove(dst); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLinkCold fetches each blob, 10 kB, from a store in memory.
func BenchmarkLinkCold(b *testing.B) {
	x := start(b, 64<<20)
	for b.Loop() {
		b.StopTimer()
		d, _ := x.blob(b, 10000)
		dst := x.dst()
		b.StartTimer()
		if err := x.Link(b.Context(), d, false, dst); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen lists 100 000 files.
func BenchmarkOpen(b *testing.B) {
	x := start(b, 64<<20)
	x.Close()
	for i := range 100_000 {
		d := castest.Space(b, "").Of(fmt.Append(nil, i))
		name := fmt.Sprintf("%s/cas/%s/%s-%s-%d.%d", x.dir, d.Hash()[:2], d.Space().Token(), d.Hash(), d.Size(), i+10)
		f, err := os.Create(name)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	for b.Loop() {
		x.open(b, 1<<40)
		x.Close()
	}
}

// BenchmarkRead64MiB reads a blob that is held, as a frontend does, with and without a sum in its name.
func BenchmarkRead64MiB(b *testing.B) {
	for _, summed := range []bool{true, false} {
		b.Run(fmt.Sprintf("summed=%v", summed), func(b *testing.B) {
			const size = 64 << 20
			x := start(b, 1<<30)
			d, data := x.blob(b, size)
			x.link(b, d, false, data)
			buf := make([]byte, 1<<20)
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if !summed {
					x.Unsum()
				}
				r := x.openAt(b.Context(), b, d, 0)
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, buf)
				if err := errors.Join(err, r.Close()); err != nil || n != size {
					b.Fatal(n, err)
				}
			}
		})
	}
}
