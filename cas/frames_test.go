package cas_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// TestFramesOfDamagedBlobs: frames of a blob that is damaged end with the error and lack the last one.
func TestFramesOfDamagedBlobs(t *testing.T) {
	for _, size := range []int{1, 1000, 512 << 10, 2<<20 + 1} {
		m := castest.NewMemory()
		d, data := castest.Blob(castest.Space(t, ""), size)
		wrong := bytes.Clone(data)
		wrong[0] ^= 1
		for name, bad := range map[string][]byte{"wrong": wrong, "short": data[:size-1], "empty": nil, "long": append(bytes.Clone(data), 1)} {
			m.Corrupt(d, bad)
			for way, read := range map[string]func(io.Reader) ([]byte, error){
				"Read": io.ReadAll,
				"WriteTo": func(r io.Reader) ([]byte, error) {
					var b bytes.Buffer
					_, err := io.Copy(struct{ io.Writer }{&b}, r)
					return b.Bytes(), err
				},
			} {
				r, err := cas.OpenFrames(t.Context(), m, d, 0)
				if err != nil {
					t.Fatal(err)
				}
				got, err := read(r)
				if !errors.Is(err, cas.ErrMismatch) {
					t.Errorf("%s of %d bytes, %s: error %v, want ErrMismatch", name, size, way, err)
				}
				if n, err := r.Read(make([]byte, 10)); n != 0 || !errors.Is(err, cas.ErrMismatch) {
					t.Errorf("%s of %d bytes, %s: again: %d bytes, %v", name, size, way, n, err)
				}
				if err := r.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
				z := compress.NewReader(bytes.NewReader(got), int64(size))
				if whole, err := io.ReadAll(z); err != nil || len(whole) >= size {
					t.Errorf("%s of %d bytes, %s: %d of them came out, %v", name, size, way, len(whole), err)
				}
				if err := z.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			}
		}
	}
}

// TestFramesOfFailingStore: an error of the store comes through as it is.
func TestFramesOfFailingStore(t *testing.T) {
	fail := errors.New("the store failed")
	m := castest.NewMemory()
	d, data := castest.Blob(castest.Space(t, ""), 2<<20)
	if err := m.Put(t.Context(), d, iotest.HalfReader(bytes.NewReader(data))); err != nil {
		t.Fatal(err)
	}
	for _, after := range []int64{-1, 0, 1 << 20, 2<<20 - 1} {
		s := &castest.Faulty{Store: m, Plan: func(castest.Op, digest.Digest) castest.Fault { return castest.Fault{After: after, Err: fail} }}
		r, err := cas.OpenFrames(t.Context(), s, d, 0)
		if err == nil {
			_, err = io.Copy(io.Discard, r)
			err = errors.Join(err, r.Close())
		}
		if !errors.Is(err, fail) {
			t.Errorf("after %d bytes: error %v, want %v", after, err, fail)
		}
	}
}

func BenchmarkOpenFrames(b *testing.B) {
	m := castest.NewMemory()
	for _, size := range []int{1 << 10, 8 << 20} {
		d, data := castest.Blob(castest.Space(b, ""), size)
		if err := m.Put(b.Context(), d, bytes.NewReader(data)); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				r, err := cas.OpenFrames(b.Context(), m, d, 0)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Fatal(err)
				}
				if err := r.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
