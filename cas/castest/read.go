package castest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func testRoundTrip(t *testing.T, s cas.Store) {
	for _, size := range sizes() {
		d, data := Blob(Space(t, ""), size)
		wantAbsent(t, s, d)
		put(t, s, d, data)
		wantBlob(t, s, d, data)
		wantBlob(t, s, d, data)
	}
	zeros := make([]byte, 2<<20)
	d := Space(t, "").Of(zeros)
	put(t, s, d, zeros)
	wantBlob(t, s, d, zeros)
}

func testOffsets(t *testing.T, s cas.Store) {
	for _, size := range sizes() {
		d, data := added(t, s, Space(t, ""), size)
		for _, offset := range []int{0, 1, size / 2, 512<<10 - 1, 512 << 10, 512<<10 + 1, 1 << 20, size - 1, size} {
			if offset > size {
				continue
			}
			r, err := s.Open(t.Context(), d, int64(offset))
			if err != nil {
				t.Fatalf("Open(%v, %d): %v", d, offset, err)
			}
			got, err := io.ReadAll(r)
			if err := errors.Join(err, r.Close()); err != nil {
				t.Fatalf("reading %v from %d: %v", d, offset, err)
			}
			if !bytes.Equal(got, data[offset:]) {
				t.Fatalf("%v from %d: %d bytes that differ from the %d expected", d, offset, len(got), size-offset)
			}
		}
	}
}

// testReadShapes reads with small and uneven buffers and through io.WriterTo, into writers that
// take everything and that fail.
func testReadShapes(t *testing.T, s cas.Store) {
	d, data := added(t, s, Space(t, ""), 1<<20+3)
	open := func() io.ReadCloser {
		r, err := s.Open(t.Context(), d, 0)
		if err != nil {
			t.Fatalf("Open: %v", err)
		}
		return r
	}
	for name, shape := range map[string]func(io.Reader) io.Reader{"half": iotest.HalfReader, "timely end": iotest.DataErrReader} {
		r := open()
		got, err := io.ReadAll(shape(r))
		if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s reads: %d bytes of %d, error %v", name, len(got), len(data), err)
		}
	}

	r := open()
	var got bytes.Buffer
	n, err := io.CopyBuffer(struct{ io.Writer }{&got}, r, make([]byte, 777))
	if err := errors.Join(err, r.Close()); err != nil || n != int64(len(data)) || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("copy: %d bytes of %d, error %v", n, len(data), err)
	}

	r = open()
	head := make([]byte, 700<<10)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Errorf("reading the head: %v", err)
	}
	var tail bytes.Buffer
	_, err = io.Copy(struct{ io.Writer }{&tail}, r)
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(slices.Concat(head, tail.Bytes()), data) {
		t.Errorf("copy after a read: %d and %d bytes of %d, error %v", len(head), tail.Len(), len(data), err)
	}

	r = open()
	broken := errors.New("the writer failed")
	if _, err := io.Copy(writerFunc(func([]byte) (int, error) { return 0, broken }), r); !errors.Is(err, broken) {
		t.Errorf("copy into a failing writer: error %v", err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func testReaderClosedEarly(t *testing.T, s cas.Store) {
	d, data := added(t, s, Space(t, ""), 3<<20)
	for _, n := range []int{0, 1, 600 << 10} {
		r, err := s.Open(t.Context(), d, 0)
		if err != nil {
			t.Fatalf("Open: %v", err)
		}
		if _, err := io.ReadFull(r, make([]byte, n)); err != nil {
			t.Fatalf("reading %d bytes: %v", n, err)
		}
		soon(t, "Close", func() {
			if err := r.Close(); err != nil {
				t.Errorf("Close after %d bytes: %v", n, err)
			}
		})
	}
	wantBlob(t, s, d, data)
}

func testReadAll(t *testing.T, s cas.Store) {
	for _, size := range []int{0, 1, 512<<10 + 1} {
		d, data := added(t, s, Space(t, ""), size)
		got, err := cas.ReadAll(t.Context(), s, d, int64(size))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("ReadAll(%v): %d bytes, error %v", d, len(got), err)
		}
	}
	d, _ := added(t, s, Space(t, ""), 11)
	if _, err := cas.ReadAll(t.Context(), s, d, 10); err == nil || !strings.Contains(err.Error(), d.String()) {
		t.Errorf("ReadAll beyond its limit: error %v, want one that names %v", err, d)
	}
	absent, _ := Blob(Space(t, ""), 10)
	_, err := cas.ReadAll(t.Context(), s, absent, 10)
	wantError(t, "ReadAll", err, cas.ErrNotFound)
}

func testAbsent(t *testing.T, s cas.Store) {
	for _, size := range []int{1, 512 << 10, 512<<10 + 1, 1 << 30} {
		d := Space(t, "").Of([]byte{1})
		d, err := d.Space().New(strings.Repeat("7f", len(d.Hash())/2), int64(size))
		if err != nil {
			t.Fatal(err)
		}
		wantAbsent(t, s, d)
		wantNotFound(t, s, d, 1)
	}
}

// testEmpty is row GEN-20.
func testEmpty(t *testing.T, s cas.Store) {
	for _, instance := range []string{"", "castest/empty"} {
		d := Space(t, instance).Of(nil)
		wantBlob(t, s, d, nil)
		put(t, s, d, nil)
		wantBlob(t, s, d, nil)
	}
}

// testImpossible is row GEN-21.
func testImpossible(t *testing.T, s cas.Store) {
	space := Space(t, "")
	sizeless, err := space.New(space.Of([]byte{1}).Hash(), 0)
	if err != nil {
		t.Fatal(err)
	}
	empty, err := space.New(space.Of(nil).Hash(), 3)
	if err != nil {
		t.Fatal(err)
	}
	wantAbsent(t, s, sizeless)
	wantAbsent(t, s, empty)
	wantError(t, "Put of no bytes", s.Put(t.Context(), sizeless, strings.NewReader("")), cas.ErrMismatch)
	wantError(t, "Put of three bytes", s.Put(t.Context(), empty, strings.NewReader("abc")), cas.ErrMismatch)
	wantAbsent(t, s, sizeless)
	wantAbsent(t, s, empty)
}

// testSpaces is rows GEN-3, GEN-7 and GEN-17.
func testSpaces(t *testing.T, s cas.Store) {
	instances := []string{"", "a", "b", "a/b", "a-b", "a_b", "A", "über/größe", "*.>", "a b", "%2f", strings.Repeat("long/", 51) + "x"}
	_, data := Blob(Space(t, ""), 5000)
	for i, instance := range instances {
		d := Space(t, instance).Of(data)
		wantAbsent(t, s, d)
		put(t, s, d, data)
		wantBlob(t, s, d, data)
		if i+1 < len(instances) {
			wantAbsent(t, s, Space(t, instances[i+1]).Of(data))
		}
	}
}

// testFunctions stores blobs of every digest function, and checks that equal hashes of two functions
// are two blobs (row GEN-17).
func testFunctions(t *testing.T, s cas.Store) {
	for _, f := range digest.Functions() {
		for _, instance := range []string{"", "a/b", strings.Repeat("functions/", 25) + "x"} {
			space, err := digest.SpaceOf(instance, f.Proto(), "")
			if err != nil {
				t.Fatal(err)
			}
			for _, size := range []int{1000, 600 << 10} {
				d, data := Blob(space, size)
				wantAbsent(t, s, d)
				wantError(t, "Put of other bytes", s.Put(t.Context(), d, bytes.NewReader(make([]byte, size))), cas.ErrMismatch)
				put(t, s, d, data)
				wantBlob(t, s, d, data)
				for _, other := range digest.Functions() {
					if foreign, err := digest.SpaceOf(instance, other.Proto(), ""); err != nil {
						t.Fatal(err)
					} else if twin, err := foreign.New(d.Hash(), d.Size()); err == nil && other != f {
						wantAbsent(t, s, twin)
					}
				}
			}
			empty := space.Of(nil)
			wantMissing(t, s, []digest.Digest{empty}, nil)
			wantBlob(t, s, empty, nil)
		}
	}
}

func testMissingOrder(t *testing.T, s cas.Store) {
	wantMissing(t, s, nil, nil)
	space := Space(t, "")
	var ds, want []digest.Digest
	for i := range 40 {
		d, data := Blob(space, 1+i*100)
		if i%3 == 0 {
			put(t, s, d, data)
		} else {
			want = append(want, d)
		}
		ds = append(ds, d)
	}
	large, _ := Blob(space, 600<<10)
	ds, want = append(ds, large), append(want, large)
	ds = append(ds, ds[7], ds[0], large, space.Of(nil), ds[1])
	wantMissing(t, s, ds, want)

	_, data := Blob(space, 10)
	a, b := Space(t, "castest/a").Of(data), Space(t, "castest/b").Of(data)
	put(t, s, b, data)
	wantMissing(t, s, []digest.Digest{b, a, a, b}, []digest.Digest{a})
}

// testDoneContext is audit row 15: a call with a context that has ended says why it ended.
func testDoneContext(t *testing.T, s cas.Store) {
	for _, size := range []int{100, 600 << 10} {
		d, data := added(t, s, Space(t, ""), size)
		absent, fresh := Blob(Space(t, ""), size)
		for _, d := range []digest.Digest{d, absent} {
			soon(t, "Open with a done context", func() {
				r, err := s.Open(cancelled(t), d, 0)
				if err == nil {
					_, err = io.Copy(io.Discard, r)
					err = errors.Join(err, r.Close())
				}
				wantError(t, "Open with a done context", err, errStop)
			})
			soon(t, "Missing with a done context", func() {
				_, err := s.Missing(cancelled(t), []digest.Digest{d})
				wantError(t, "Missing with a done context", err, errStop)
			})
		}
		soon(t, "Put with a done context", func() {
			wantError(t, "Put with a done context", s.Put(cancelled(t), absent, bytes.NewReader(fresh)), errStop)
		})
		wantAbsent(t, s, absent)
		wantBlob(t, s, d, data)
	}
}

// testContextEndsDuringRead reads on after the context has ended: the rest of the blob or the
// cause are right, a short blob is not.
func testContextEndsDuringRead(t *testing.T, s cas.Store) {
	for _, size := range []int{10 << 10, 3 << 20} {
		d, data := added(t, s, Space(t, ""), size)
		ctx, cancel := context.WithCancelCause(t.Context())
		r, err := s.Open(ctx, d, 0)
		if err != nil {
			t.Fatalf("Open: %v", err)
		}
		head := make([]byte, 1000)
		if _, err := io.ReadFull(r, head); err != nil {
			t.Fatalf("reading the head: %v", err)
		}
		cancel(errStop)
		soon(t, "reading after the context ended", func() {
			rest, err := io.ReadAll(r)
			got := slices.Concat(head, rest)
			switch {
			case err != nil:
				wantError(t, "reading after the context ended", err, errStop)
				if !bytes.HasPrefix(data, got) {
					t.Error("bytes before the error are wrong")
				}
			case !bytes.Equal(got, data):
				t.Errorf("%d of %d bytes, then io.EOF", len(got), len(data))
			}
			if err := r.Close(); err != nil {
				wantError(t, "Close after the context ended", err, errStop)
			}
		})
		wantBlob(t, s, d, data)
	}
}
