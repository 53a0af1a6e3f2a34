package castest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// RunFrames tests that cas.OpenFrames keeps the contract of cas.FrameOpener with the stores that open
// returns, whether they are one or not.
func RunFrames(t *testing.T, open func(testing.TB) cas.Store) {
	tests := []struct {
		name string
		run  func(*testing.T, cas.Store)
	}{
		{"FrameOffsets", testFrameOffsets},
		{"FrameShapes", testFrameShapes},
		{"FramesAbsent", testFramesAbsent},
		{"FramesCompress", testFramesCompress},
		{"FramesDoneContext", testFramesDoneContext},
		{"FramesOfSpaces", testFramesOfSpaces},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// frames reads all frames of a blob.
func frames(t testing.TB, s cas.Store, d digest.Digest, offset int64) []byte {
	t.Helper()
	r, err := cas.OpenFrames(t.Context(), s, d, offset)
	if err != nil {
		t.Fatalf("OpenFrames(%v, %d): %v", d, offset, err)
	}
	data, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatalf("reading frames of %v from %d: %v", d, offset, err)
	}
	return data
}

// wantFrames checks that the frames hold these bytes, for a decoder that takes no dictionary and no
// window above 8 MiB.
func wantFrames(t testing.TB, what string, got, want []byte) {
	t.Helper()
	z := compress.NewReader(bytes.NewReader(got), int64(len(want)))
	data, err := io.ReadAll(z)
	if err := errors.Join(err, z.Close()); err != nil || !bytes.Equal(data, want) {
		t.Fatalf("%s: %d bytes of %d in frames of %d, %v", what, len(data), len(want), len(got), err)
	}
}

func testFrameOffsets(t *testing.T, s cas.Store) {
	for _, size := range sizes() {
		d, data := added(t, s, Space(t, ""), size)
		for _, offset := range []int{0, 1, size / 2, 512<<10 - 1, 512 << 10, 512<<10 + 1, 1 << 20, size - 1, size} {
			if offset <= size {
				wantFrames(t, d.String(), frames(t, s, d, int64(offset)), data[offset:])
			}
		}
	}
	wantFrames(t, "the empty blob", frames(t, s, Space(t, "").Of(nil), 0), nil)
}

// testFrameShapes reads in odd ways, through io.WriterTo too, and closes early.
func testFrameShapes(t *testing.T, s cas.Store) {
	d, data := added(t, s, Space(t, ""), 1<<20+3)
	open := func() io.ReadCloser {
		r, err := cas.OpenFrames(t.Context(), s, d, 0)
		if err != nil {
			t.Fatalf("OpenFrames: %v", err)
		}
		return r
	}
	for name, shape := range map[string]func(io.Reader) io.Reader{"half": iotest.HalfReader, "timely end": iotest.DataErrReader} {
		r := open()
		got, err := io.ReadAll(shape(r))
		if err := errors.Join(err, r.Close()); err != nil {
			t.Fatalf("%s reads: %v", name, err)
		}
		wantFrames(t, name+" reads", got, data)
	}
	r := open()
	var got bytes.Buffer
	n, err := io.Copy(struct{ io.Writer }{&got}, r)
	if err := errors.Join(err, r.Close()); err != nil || n != int64(got.Len()) {
		t.Fatalf("copy: %d bytes of %d, %v", n, got.Len(), err)
	}
	wantFrames(t, "copy", got.Bytes(), data)

	r = open()
	if _, err := io.Copy(failingWriter{}, r); !errors.Is(err, errBroken) {
		t.Errorf("a copy to a writer that fails: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	r = open()
	_, err = io.ReadFull(r, make([]byte, 1000))
	if err := errors.Join(err, r.Close()); err != nil {
		t.Errorf("a reader that is closed early: %v", err)
	}
	wantFrames(t, "after that", frames(t, s, d, 0), data)
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errBroken }

func testFramesAbsent(t *testing.T, s cas.Store) {
	absent, _ := Blob(Space(t, ""), 1000)
	large, _ := Blob(Space(t, ""), 3<<20)
	impossible, err := Space(t, "").New(absent.Hash(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{absent, large, impossible} {
		for _, offset := range []int64{0, d.Size() / 2, d.Size()} {
			r, err := cas.OpenFrames(t.Context(), s, d, offset)
			if err == nil {
				err = errors.Join(errors.New("frames of an absent blob"), r.Close())
			}
			wantError(t, "OpenFrames", err, cas.ErrNotFound)
		}
	}
}

// testFramesCompress: what can be compressed is, a large blob if the store wants to spend the time.
func testFramesCompress(t *testing.T, s cas.Store) {
	for _, size := range []int{10_000, 400_000, 3 << 20} {
		_, unique := Blob(Space(t, ""), 32)
		data := []byte(strings.Repeat(string(unique)+"compressible ", size/40))
		d := Space(t, "").Of(data)
		put(t, s, d, data)
		got := frames(t, s, d, 0)
		most := len(data) / 4
		if size > 1<<20 {
			most = len(data) + len(data)/100
		}
		if len(got) > most {
			t.Errorf("frames of %d bytes have %d", len(data), len(got))
		}
		wantFrames(t, "compressible", got, data)
	}
}

func testFramesDoneContext(t *testing.T, s cas.Store) {
	for _, size := range []int{1000, 2 << 20} {
		d, _ := added(t, s, Space(t, ""), size)
		soon(t, "OpenFrames with a context that has ended", func() {
			r, err := cas.OpenFrames(cancelled(t), s, d, 0)
			if err == nil {
				_, err = io.Copy(io.Discard, r)
				if errClose := r.Close(); errClose != nil {
					t.Errorf("Close: %v", errClose)
				}
			}
			wantError(t, "OpenFrames with a context that has ended", err, errStop)
		})
	}
	d, _ := added(t, s, Space(t, ""), 8<<20)
	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := cas.OpenFrames(ctx, s, d, 0)
	if err != nil {
		t.Fatalf("OpenFrames: %v", err)
	}
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Fatalf("Read: %v", err)
	}
	cancel(errStop)
	soon(t, "reading frames with a context that ends", func() {
		// What is at hand may still come.
		if _, err := io.Copy(io.Discard, r); err != nil {
			wantError(t, "reading frames with a context that ends", err, errStop)
		}
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

func testFramesOfSpaces(t *testing.T, s cas.Store) {
	for _, f := range digest.Functions() {
		space, err := digest.SpaceOf("frames/of", f.Proto(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{5000, 700_000} {
			d, data := added(t, s, space, size)
			wantFrames(t, d.String(), frames(t, s, d, 0), data)
		}
	}
}
