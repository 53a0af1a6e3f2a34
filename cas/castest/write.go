package castest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/jetfarm/jetfarm/cas"
)

func testSourceShapes(t *testing.T, s cas.Store) {
	shapes := map[string]func(io.Reader) io.Reader{
		"one byte": iotest.OneByteReader, "half": iotest.HalfReader, "data with the end": iotest.DataErrReader,
		"uneven": func(r io.Reader) io.Reader {
			return readerFunc(func(p []byte) (int, error) { return r.Read(p[:min(len(p), 12345)]) })
		},
		"empty reads": func(r io.Reader) io.Reader {
			odd := false
			return readerFunc(func(p []byte) (int, error) {
				if odd = !odd; odd {
					return 0, nil
				}
				return r.Read(p)
			})
		},
	}
	for name, shape := range shapes {
		for _, size := range []int{1, 1 << 10, 512 << 10, 700 << 10} {
			d, data := Blob(Space(t, ""), size)
			if err := s.Put(t.Context(), d, shape(bytes.NewReader(data))); err != nil {
				t.Fatalf("Put of %d bytes from a %s source: %v", size, name, err)
			}
			wantBlob(t, s, d, data)
		}
	}
}

// testWrongSize is row GEN-9.
func testWrongSize(t *testing.T, s cas.Store) {
	d, data := added(t, s, Space(t, ""), 1000)
	for _, size := range []int64{999, 1001, 600 << 10} {
		other, err := d.Space().New(d.Hash(), size)
		if err != nil {
			t.Fatal(err)
		}
		wantAbsent(t, s, other)
		wantError(t, "Put under the wrong size", s.Put(t.Context(), other, bytes.NewReader(data)), cas.ErrMismatch)
		wantAbsent(t, s, other)
	}
	wantBlob(t, s, d, data)
}

func testMismatch(t *testing.T, s cas.Store) {
	space := unused(t) // the shortest blobs are not unique
	for _, size := range sizes() {
		d, data := Blob(space, size)
		flipped := bytes.Clone(data)
		flipped[size-1] ^= 1
		first := bytes.Clone(data)
		first[0] ^= 0x80
		for name, bad := range map[string][]byte{
			"last bit": flipped, "first bit": first, "short": data[:size-1], "empty": nil,
			"long": append(bytes.Clone(data), 0), "twice": append(bytes.Clone(data), data...),
		} {
			err := s.Put(t.Context(), d, bytes.NewReader(bad))
			wantError(t, "Put of wrong bytes ("+name+")", err, cas.ErrMismatch)
			wantAbsent(t, s, d)
		}
		put(t, s, d, data)
		wantBlob(t, s, d, data)
	}
}

// testEndlessSource is defect D-47: what is too long is not read to its end first.
func testEndlessSource(t *testing.T, s cas.Store) {
	for _, size := range []int{1000, 600 << 10} {
		d, data := Blob(Space(t, ""), size)
		read := 0
		endless := readerFunc(func(p []byte) (int, error) {
			read += len(p)
			return len(p), nil
		})
		soon(t, "Put of an endless source", func() {
			err := s.Put(t.Context(), d, io.MultiReader(bytes.NewReader(data), endless))
			wantError(t, "Put of an endless source", err, cas.ErrMismatch)
		})
		if read > 4<<20 {
			t.Errorf("Put read %d bytes past the end of the blob", read)
		}
		wantAbsent(t, s, d)
	}
}

func testSourceFails(t *testing.T, s cas.Store) {
	broken := errors.New("the source failed")
	space := unused(t) // the shortest blobs are not unique
	for _, fail := range []error{broken, io.ErrUnexpectedEOF} {
		for _, size := range sizes() {
			d, data := Blob(space, size)
			for _, n := range []int{0, size / 2, size} {
				err := s.Put(t.Context(), d, io.MultiReader(bytes.NewReader(data[:n]), iotest.ErrReader(fail)))
				if err != fail { //nolint:errorlint // As it is.
					t.Fatalf("Put of %d of %d bytes from a source that fails: error %v, want %v as it is", n, size, err, fail)
				}
				wantAbsent(t, s, d)
			}
		}
	}
}

func testPutAgain(t *testing.T, s cas.Store) {
	for _, size := range []int{1000, 600 << 10} {
		d, data := added(t, s, Space(t, ""), size)
		reading, err := s.Open(t.Context(), d, 0)
		if err != nil {
			t.Fatalf("Open: %v", err)
		}
		put(t, s, d, data)
		wrong := bytes.Repeat([]byte{1}, size)
		if err := s.Put(t.Context(), d, bytes.NewReader(wrong)); err != nil {
			wantError(t, "Put of wrong bytes of a blob that is there", err, cas.ErrMismatch)
		}
		got, err := io.ReadAll(reading)
		if err := errors.Join(err, reading.Close()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("a reader during a second Put: %d of %d bytes, error %v", len(got), size, err)
		}
		wantBlob(t, s, d, data)
	}
}

// testContextEndsDuringPut is audit row 3: the context of the call ends while the source has
// nothing, and the source ends with it.
func testContextEndsDuringPut(t *testing.T, s cas.Store) {
	for _, size := range []int{1000, 3 << 20} {
		d, data := Blob(Space(t, ""), size)
		ctx, cancel := context.WithCancelCause(t.Context())
		stalled := readerFunc(func([]byte) (int, error) {
			cancel(errStop)
			<-ctx.Done()
			return 0, context.Cause(ctx)
		})
		soon(t, "Put with a context that ends", func() {
			err := s.Put(ctx, d, io.MultiReader(bytes.NewReader(data[:size/2]), stalled))
			wantError(t, "Put with a context that ends", err, errStop)
		})
		wantAbsent(t, s, d)
		put(t, s, d, data)
		wantBlob(t, s, d, data)
	}
}
