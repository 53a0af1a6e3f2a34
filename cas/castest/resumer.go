package castest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// RunResumer tests that the stores that open returns, each of them a cas.Resumer, keep the contract of
// that. A store may keep up to 1 MiB less than what an upload brought.
func RunResumer(t *testing.T, open func(testing.TB) cas.Store) {
	tests := []struct {
		name string
		run  func(*testing.T, resumer)
	}{
		{"GoesOn", testGoesOn},
		{"AnyOffset", testAnyOffset},
		{"StartsOver", testStartsOver},
		{"NotKept", testNotKept},
		{"MismatchOfParts", testMismatchOfParts},
		{"UploadsAreSeparate", testUploadsAreSeparate},
		{"ResumePresent", testResumePresent},
		{"ResumeDoneContext", testResumeDoneContext},
		{"ContextEndsDuringUpload", testContextEndsDuringUpload},
		{"EqualUploads", testEqualUploads},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, ok := open(t).(resumer)
			if !ok {
				t.Fatal("the store is not a cas.Resumer")
			}
			test.run(t, s)
		})
	}
}

type resumer interface {
	cas.Store
	cas.Resumer
}

// keptLess is how much less than it was given a store may keep.
const keptLess = 1 << 20

// resumed are sizes of blobs of which something has to be kept when half was brought.
func resumed() []int { return []int{3 << 20, 3<<20 + 17} }

var errBroken = errors.New("the source of this upload broke")

// broken ends with errBroken after data.
func broken(data []byte) io.Reader {
	return io.MultiReader(bytes.NewReader(data), iotest.ErrReader(errBroken))
}

// half brings the first half of a blob and returns how much of it is kept.
func half(t testing.TB, s resumer, d digest.Digest, upload string, data []byte) int64 {
	t.Helper()
	n := len(data) / 2
	if err := s.PutFrom(t.Context(), d, upload, 0, broken(data[:n])); err != errBroken { //nolint:errorlint // As it is.
		t.Fatalf("PutFrom from a source that fails: error %v, want %v as it is", err, errBroken)
	}
	wantAbsent(t, s, d)
	kept := wantCommitted(t, s, d, upload)
	if kept <= 0 || kept > int64(n) || kept < int64(n)-keptLess {
		t.Fatalf("%d bytes are kept of %d", kept, n)
	}
	return kept
}

func wantCommitted(t testing.TB, s resumer, d digest.Digest, upload string) int64 {
	t.Helper()
	kept, err := s.Committed(t.Context(), d, upload)
	if err != nil {
		t.Fatalf("Committed: %v", err)
	}
	return kept
}

// testGoesOn breaks an upload several times.
func testGoesOn(t *testing.T, s resumer) {
	for _, size := range resumed() {
		d, data := Blob(Space(t, ""), size)
		if kept := wantCommitted(t, s, d, "goes on"); kept != 0 {
			t.Fatalf("%d bytes are kept of an upload that never was", kept)
		}
		kept := half(t, s, d, "goes on", data)
		end := len(data) * 3 / 4
		if err := s.PutFrom(t.Context(), d, "goes on", kept, broken(data[kept:end])); err != errBroken { //nolint:errorlint // As it is.
			t.Fatalf("PutFrom from %d from a source that fails: %v", kept, err)
		}
		more := wantCommitted(t, s, d, "goes on")
		if more < kept || more < int64(end)-keptLess || more > int64(end) {
			t.Fatalf("%d bytes are kept of %d", more, end)
		}
		if err := s.PutFrom(t.Context(), d, "goes on", more, iotest.HalfReader(bytes.NewReader(data[more:]))); err != nil {
			t.Fatalf("PutFrom from %d: %v", more, err)
		}
		wantBlob(t, s, d, data)
	}
	for _, size := range sizes() { // Without a break it is Put, for short blobs too.
		d, data := Blob(Space(t, "a/b"), size)
		if err := s.PutFrom(t.Context(), d, "at once", 0, bytes.NewReader(data)); err != nil {
			t.Fatalf("PutFrom: %v", err)
		}
		wantBlob(t, s, d, data)
	}
}

// testAnyOffset goes on before the end of what is kept.
func testAnyOffset(t *testing.T, s resumer) {
	for name, of := range map[string]func(kept int64) int64{
		"one before": func(kept int64) int64 { return kept - 1 }, "early": func(int64) int64 { return 1 },
		"half": func(kept int64) int64 { return kept / 2 }, "half and one": func(kept int64) int64 { return kept/2 + 1 },
	} {
		d, data := Blob(Space(t, ""), 3<<20)
		at := of(half(t, s, d, "any", data))
		if err := s.PutFrom(t.Context(), d, "any", at, bytes.NewReader(data[at:])); err != nil {
			t.Fatalf("PutFrom from %d (%s): %v", at, name, err)
		}
		wantBlob(t, s, d, data)
	}
}

func testStartsOver(t *testing.T, s resumer) {
	d, data := Blob(Space(t, ""), 3<<20)
	half(t, s, d, "over", data)
	half(t, s, d, "over", data)
	if err := s.PutFrom(t.Context(), d, "over", 0, bytes.NewReader(data)); err != nil {
		t.Fatalf("PutFrom from 0: %v", err)
	}
	wantBlob(t, s, d, data)
}

// testNotKept asks to go on where nothing is.
func testNotKept(t *testing.T, s resumer) {
	unread := readerFunc(func([]byte) (int, error) {
		t.Error("PutFrom reads what it cannot use")
		return 0, errBroken
	})
	for _, size := range []int{1000, 3 << 20} {
		d, _ := Blob(Space(t, ""), size)
		for _, at := range []int64{1, int64(size) - 1, int64(size)} {
			wantError(t, "PutFrom of an unknown upload", s.PutFrom(t.Context(), d, "never was", at, unread), cas.ErrNotKept)
		}
	}
	d, data := Blob(Space(t, ""), 3<<20)
	kept := half(t, s, d, "kept", data)
	for _, at := range []int64{kept + 1, int64(len(data))} {
		wantError(t, "PutFrom beyond what is kept", s.PutFrom(t.Context(), d, "kept", at, unread), cas.ErrNotKept)
	}
	if again := wantCommitted(t, s, d, "kept"); again != kept {
		t.Errorf("%d bytes are kept, %d were", again, kept)
	}
	wantAbsent(t, s, d)
}

// testMismatchOfParts ends an upload whose beginning, or whose end, is wrong.
func testMismatchOfParts(t *testing.T, s resumer) {
	for _, wrongEnd := range []bool{false, true} {
		d, data := Blob(Space(t, ""), 3<<20)
		first, last := bytes.Clone(data), bytes.Clone(data)
		if wrongEnd {
			last[len(last)-1] ^= 1
		} else {
			first[0] ^= 1
		}
		kept := half(t, s, d, "wrong", first)
		err := s.PutFrom(t.Context(), d, "wrong", kept, bytes.NewReader(last[kept:]))
		wantError(t, "PutFrom of wrong bytes", err, cas.ErrMismatch)
		wantAbsent(t, s, d)
		if kept := wantCommitted(t, s, d, "wrong"); kept != 0 {
			t.Errorf("%d bytes are kept of an upload that was wrong", kept)
		}
		for name, bad := range map[string][]byte{"short": data[kept : len(data)-1], "long": append(bytes.Clone(data[kept:]), 0)} {
			kept := half(t, s, d, name, data)
			wantError(t, "PutFrom of a "+name+" end", s.PutFrom(t.Context(), d, name, kept, bytes.NewReader(bad)), cas.ErrMismatch)
			wantAbsent(t, s, d)
		}
		put(t, s, d, data)
		wantBlob(t, s, d, data)
	}
}

// testUploadsAreSeparate uses one name for several blobs and several names for one (row WR-3).
func testUploadsAreSeparate(t *testing.T, s resumer) {
	d, data := Blob(Space(t, ""), 3<<20)
	other, otherData := Blob(Space(t, ""), 3<<20)
	twin := Space(t, "castest/separate").Of(data)
	kept := half(t, s, d, "one", data)
	for what, n := range map[string]int64{
		"another name": wantCommitted(t, s, d, "two"), "another blob": wantCommitted(t, s, other, "one"), "another space": wantCommitted(t, s, twin, "one"),
	} {
		if n != 0 {
			t.Errorf("%d bytes are kept under %s", n, what)
		}
	}
	half(t, s, other, "one", otherData)
	half(t, s, d, "two", otherData) // wrong bytes
	if err := s.PutFrom(t.Context(), d, "one", kept, bytes.NewReader(data[kept:])); err != nil {
		t.Fatalf("PutFrom from %d: %v", kept, err)
	}
	wantBlob(t, s, d, data)
	wantAbsent(t, s, other)
	wantAbsent(t, s, twin)
}

func testResumePresent(t *testing.T, s resumer) {
	for _, size := range []int{1000, 3 << 20} {
		d, data := added(t, s, Space(t, ""), size)
		if err := s.PutFrom(t.Context(), d, "present", 0, bytes.NewReader(data)); err != nil {
			t.Errorf("PutFrom of a blob that is there: %v", err)
		}
		wantBlob(t, s, d, data)
	}
	empty := Space(t, "").Of(nil)
	if err := s.PutFrom(t.Context(), empty, "present", 0, bytes.NewReader(nil)); err != nil {
		t.Errorf("PutFrom of the empty blob: %v", err)
	}
	if kept := wantCommitted(t, s, empty, "present"); kept != 0 {
		t.Errorf("%d bytes are kept of the empty blob", kept)
	}
}

func testResumeDoneContext(t *testing.T, s resumer) {
	d, data := Blob(Space(t, ""), 3<<20)
	soon(t, "calls with a context that has ended", func() {
		_, err := s.Committed(cancelled(t), d, "done")
		wantError(t, "Committed", err, errStop)
		wantError(t, "PutFrom", s.PutFrom(cancelled(t), d, "done", 0, bytes.NewReader(data)), errStop)
		wantError(t, "PutFrom from 1", s.PutFrom(cancelled(t), d, "done", 1, bytes.NewReader(data[1:])), errStop)
	})
	wantAbsent(t, s, d)
}

// testContextEndsDuringUpload is a client that leaves in the middle.
func testContextEndsDuringUpload(t *testing.T, s resumer) {
	d, data := Blob(Space(t, ""), 3<<20)
	ctx, cancel := context.WithCancelCause(t.Context())
	stalled := readerFunc(func([]byte) (int, error) {
		cancel(errStop)
		<-ctx.Done()
		return 0, context.Cause(ctx)
	})
	soon(t, "PutFrom with a context that ends", func() {
		err := s.PutFrom(ctx, d, "left", 0, io.MultiReader(bytes.NewReader(data[:2<<20]), stalled))
		wantError(t, "PutFrom with a context that ends", err, errStop)
	})
	wantAbsent(t, s, d)
	kept := wantCommitted(t, s, d, "left")
	if kept <= 0 || kept > 2<<20 {
		t.Fatalf("%d bytes are kept of %d", kept, 2<<20)
	}
	if err := s.PutFrom(t.Context(), d, "left", kept, bytes.NewReader(data[kept:])); err != nil {
		t.Fatalf("PutFrom from %d: %v", kept, err)
	}
	wantBlob(t, s, d, data)
}

// testEqualUploads is a client that retries while the server has not noticed that the first attempt is
// over: bytes of the two must not mix.
func testEqualUploads(t *testing.T, s resumer) {
	for range 2 {
		d, data := Blob(Space(t, ""), 3<<20)
		wrong := bytes.Repeat([]byte("wrong"), len(data)/5+1)[:len(data)]
		kept := half(t, s, d, "equal", data)
		var g errgroup.Group
		right := make([]error, 3)
		for i := range right {
			g.Go(func() error {
				right[i] = s.PutFrom(t.Context(), d, "equal", kept, iotest.HalfReader(bytes.NewReader(data[kept:])))
				return nil
			})
		}
		g.Go(func() error {
			_ = s.PutFrom(t.Context(), d, "equal", 0, bytes.NewReader(wrong)) //nolint:errcheck // Success, when another was faster.
			return nil
		})
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		for _, err := range right {
			// What is kept may go while it is used, since another upload has ended.
			if err != nil && !errors.Is(err, cas.ErrNotKept) && !errors.Is(err, cas.ErrUnavailable) {
				t.Errorf("PutFrom beside others: %v", err)
			}
		}
		if missing, err := s.Missing(t.Context(), []digest.Digest{d}); err != nil || len(missing) > 0 {
			put(t, s, d, data)
		}
		wantBlob(t, s, d, data)
	}
}
