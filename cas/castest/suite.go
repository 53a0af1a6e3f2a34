package castest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Run tests that the stores that open returns keep the contract of cas.Store. Each subtest opens
// its own; open registers what has to be cleaned up with its argument. Stores need not be empty,
// nor separate from each other.
func Run(t *testing.T, open func(testing.TB) cas.Store) {
	tests := []struct {
		name string
		run  func(*testing.T, cas.Store)
	}{
		{"RoundTrip", testRoundTrip},
		{"SourceShapes", testSourceShapes},
		{"Offsets", testOffsets},
		{"ReadShapes", testReadShapes},
		{"ReaderClosedEarly", testReaderClosedEarly},
		{"ReadAll", testReadAll},
		{"Absent", testAbsent},
		{"Empty", testEmpty},
		{"Impossible", testImpossible},
		{"Spaces", testSpaces},
		{"Functions", testFunctions},
		{"WrongSize", testWrongSize},
		{"Mismatch", testMismatch},
		{"EndlessSource", testEndlessSource},
		{"SourceFails", testSourceFails},
		{"PutAgain", testPutAgain},
		{"MissingOrder", testMissingOrder},
		{"Sizer", testSizer},
		{"DoneContext", testDoneContext},
		{"ContextEndsDuringRead", testContextEndsDuringRead},
		{"ContextEndsDuringPut", testContextEndsDuringPut},
		{"EqualPuts", testEqualPuts},
		{"MixedUse", testMixedUse},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// patience is how long a call may take that has no reason to wait.
const patience = 20 * time.Second

// sizes are lengths around the one of a chunk of the object store.
func sizes() []int { return []int{1, 2, 1 << 10, 512<<10 - 1, 512 << 10, 512<<10 + 1, 3 * 512 << 10} }

// Space is a key space with the default digest function.
func Space(t testing.TB, instance string) digest.Space {
	t.Helper()
	s, err := digest.SpaceOf(instance, repb.DigestFunction_SHA256, "")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// unused is a key space in which nothing else in the test process puts blobs.
func unused(t testing.TB) digest.Space {
	t.Helper()
	return Space(t, "unused/"+strconv.FormatUint(rand.Uint64(), 36))
}

// Blob returns bytes that nothing else in the test process has, unless they are only a few, and their
// digest. Every other half KiB of them is compressible.
func Blob(space digest.Space, size int) (digest.Digest, []byte) {
	data := make([]byte, size, size+8)
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], rand.Uint64())
	binary.LittleEndian.PutUint64(seed[8:], rand.Uint64())
	noise := rand.NewChaCha8(seed)
	for at := 0; at < size; at += 1 << 10 {
		_, _ = noise.Read(data[at:min(size, at+512)]) //nolint:errcheck // It has none.
	}
	return space.Of(data), data
}

func put(t testing.TB, s cas.Store, d digest.Digest, data []byte) {
	t.Helper()
	if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatalf("Put(%v): %v", d, err)
	}
}

// added puts a new blob.
func added(t testing.TB, s cas.Store, space digest.Space, size int) (digest.Digest, []byte) {
	t.Helper()
	d, data := Blob(space, size)
	put(t, s, d, data)
	return d, data
}

// wantBlob checks that the store has the blob with these bytes.
func wantBlob(t testing.TB, s cas.Store, d digest.Digest, want []byte) {
	t.Helper()
	wantMissing(t, s, []digest.Digest{d}, nil)
	r, err := s.Open(t.Context(), d, 0)
	if err != nil {
		t.Fatalf("Open(%v): %v", d, err)
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatalf("reading %v: %v", d, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%v has %d bytes that differ from the %d that were put", d, len(got), len(want))
	}
}

// wantAbsent checks that neither Missing nor Open know the blob.
func wantAbsent(t testing.TB, s cas.Store, d digest.Digest) {
	t.Helper()
	wantMissing(t, s, []digest.Digest{d}, []digest.Digest{d})
	wantNotFound(t, s, d, 0)
}

// wantNotFound checks that Open does not find the blob.
func wantNotFound(t testing.TB, s cas.Store, d digest.Digest, offset int64) {
	t.Helper()
	r, err := s.Open(t.Context(), d, offset)
	if err == nil {
		err = errors.Join(errors.New("a reader of an absent blob"), r.Close())
	}
	wantError(t, "Open", err, cas.ErrNotFound)
}

func wantMissing(t testing.TB, s cas.Store, ds, want []digest.Digest) {
	t.Helper()
	got, err := s.Missing(t.Context(), ds)
	if err != nil {
		t.Fatalf("Missing: %v", err)
	}
	if diff := cmp.Diff(names(want), names(got)); diff != "" {
		t.Fatalf("Missing (-want +got):\n%s", diff)
	}
}

func names(ds []digest.Digest) []string {
	var out []string
	for _, d := range ds {
		out = append(out, d.String())
	}
	return out
}

// wantError checks that err wraps want and none of the other errors of a store.
func wantError(t testing.TB, call string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("%s: error %v, want %v", call, err, want)
	}
	for _, other := range []error{cas.ErrNotFound, cas.ErrMismatch, cas.ErrFull, cas.ErrUnavailable} {
		if !errors.Is(other, want) && errors.Is(err, other) {
			t.Fatalf("%s: error %v is %v as well as %v", call, err, other, want)
		}
	}
}

// soon runs f and fails the test when f takes longer than patience.
func soon(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-done:
		if t.Failed() {
			t.FailNow() // f may have ended early, by a Fatal on its goroutine.
		}
	case <-timer.C:
		t.Fatalf("%s did not return within %v", what, patience)
	}
}

var errStop = errors.New("the test ended this context")

// cancelled returns a context that has ended with errStop.
func cancelled(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errStop)
	return ctx
}
