package disk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
)

// openAt opens a blob that is there.
func (x *fixture) openAt(ctx context.Context, t testing.TB, d digest.Digest, offset int64) io.ReadCloser {
	t.Helper()
	r, err := x.Open(ctx, d, offset)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return r
}

// read reads a blob from an offset on through WriteTo or Read.
func (x *fixture) read(t testing.TB, d digest.Digest, offset int64, want []byte) {
	t.Helper()
	r := x.openAt(t.Context(), t, d, offset)
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, want[offset:]) {
		t.Fatalf("reading %v from %d: %d bytes, error %v", d, offset, len(got), err)
	}
}

func (x *fixture) wantOpens(t testing.TB, want int64) {
	t.Helper()
	if n := x.opens.Load(); n != want {
		t.Errorf("%d Opens of the source, want %d", n, want)
	}
}

// TestReadFills: what is read whole becomes a file, and is read from there, also after a restart.
func TestReadFills(t *testing.T) {
	for _, size := range []int{disk.Smallest + 1, 1 << 20, 3<<20 + 17} {
		x := start(t, 64<<20)
		d, data := x.blob(t, size)
		x.read(t, d, 0, data)
		x.wantSound(t)
		if len(x.files()) != 1 {
			t.Fatalf("%d files after a read of %d bytes", len(x.files()), size)
		}
		x.memory.Remove(d)
		x.read(t, d, 0, data)
		x.read(t, d, 1, data)
		x.read(t, d, int64(size), data)
		x.link(t, d, true, data)
		x.reopen(t, 64<<20)
		x.read(t, d, 0, data)
		x.wantOpens(t, 1)
		x.wantSound(t)
	}
}

// TestSecondReadFills: with a fast source, what is read once is not worth a file.
func TestSecondReadFills(t *testing.T) {
	x := start(t, 64<<20)
	var err error
	x.Tier, err = disk.Open(t.Context(), disk.Config{Dir: t.TempDir(), MaxBytes: 64 << 20, SecondRead: true, Source: x.source, Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	d, data := x.blob(t, 100<<10)
	for i, opens := range []int64{1, 2, 2, 2} {
		x.read(t, d, 0, data)
		if x.opens.Load() != opens {
			t.Errorf("%d Opens of the source after %d reads, want %d", x.opens.Load(), i+1, opens)
		}
	}
	// What was read long ago counts as never read.
	forgotten, forgottenData := x.blob(t, 100<<10)
	x.read(t, forgotten, 0, forgottenData)
	for i := range 2 * disk.Remembered {
		other, err := d.Space().New(fmt.Sprintf("%064x", i+1), 100<<10)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := x.Open(t.Context(), other, 0); !errors.Is(err, cas.ErrNotFound) {
			t.Fatal(err)
		}
	}
	before := x.opens.Load()
	x.read(t, forgotten, 0, forgottenData)
	x.read(t, forgotten, 0, forgottenData)
	if n := x.opens.Load() - before; n != 2 {
		t.Errorf("%d Opens of the source, want 2", n)
	}
}

// TestReadsThatDoNotFill: parts, blobs that are small, and blobs that would take too much of the tier.
func TestReadsThatDoNotFill(t *testing.T) {
	x := start(t, 8<<20)
	for i, test := range []struct {
		size   int
		offset int64
	}{{disk.Smallest, 0}, {500 << 10, 1}, {500 << 10, 500 << 10}, {1<<20 + 1, 0}, {9 << 20, 0}} {
		d, data := x.blob(t, test.size)
		x.read(t, d, test.offset, data)
		x.wantOpens(t, int64(i+1))
		x.wantSound(t)
	}
	if files := x.files(); len(files) != 0 {
		t.Errorf("files %q", files)
	}
}

// TestFillsAtOnce: slow readers of many blobs do not make the tier exceed its bound.
func TestFillsAtOnce(t *testing.T) {
	x := start(t, 8<<20)
	var readers []io.ReadCloser
	for range 20 {
		d, _ := x.blob(t, 1<<20)
		r := x.openAt(t.Context(), t, d, 0)
		if _, err := r.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		readers = append(readers, r)
	}
	if n := len(list(filepath.Join(x.dir, "tmp"))); n != 0 { // a turn brings 1 MiB: all are done
		t.Errorf("%d temporary files", n)
	}
	if used := x.Used(); used > 8<<20+8<<20/20 {
		t.Errorf("%d bytes are used", used)
	}
	for _, r := range readers {
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Error(err)
		}
		r.Close()
	}
	x.wantSound(t)
}

// TestFirstByteComesAtOnce: a read gets what has come while the rest is still being fetched.
func TestFirstByteComesAtOnce(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 4<<20)
	held := x.gate(1 << 20)
	ctx, cancel := context.WithCancelCause(t.Context())
	r := x.openAt(ctx, t, d, 0)
	got := make([]byte, 1<<20)
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, data[:1<<20]) {
		t.Errorf("the first MiB: error %v", err)
	}
	var g errgroup.Group
	g.Go(func() error {
		_, err := r.Read(got)
		return err
	})
	<-held
	cancel(errStop)
	if err := g.Wait(); !errors.Is(err, errStop) {
		t.Errorf("a read that was cancelled: error %v", err)
	}
	r.Close()
	x.wantSound(t)
}

// TestSlowReaderHoldsNobodyUp is audit row 18: the fetch goes as fast as its fastest reader, and there
// is one.
func TestSlowReaderHoldsNobodyUp(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 6<<20)
	slow := x.openAt(t.Context(), t, d, 0)
	first := make([]byte, 1)
	if _, err := io.ReadFull(slow, first); err != nil {
		t.Fatal(err)
	}
	x.read(t, d, 0, data)
	x.link(t, d, false, data)
	rest, err := io.ReadAll(slow)
	if err := errors.Join(err, slow.Close()); err != nil || !bytes.Equal(slices.Concat(first, rest), data) {
		t.Errorf("the slow reader got %d bytes, error %v", len(rest)+1, err)
	}
	x.wantOpens(t, 1)
	x.wantSound(t)
}

// TestFetchSurvivesItsFirstReader is audit row 11 for reads: the first reader is cancelled, or closes,
// while it takes its turn or at rest, and the others go on from there.
func TestFetchSurvivesItsFirstReader(t *testing.T) {
	for _, name := range []string{"cancelled in its turn", "cancelled at rest", "closed"} {
		t.Run(name, func(t *testing.T) {
			x := start(t, 64<<20)
			d, data := x.blob(t, 4<<20)
			inTurn := name == "cancelled in its turn"
			var held chan struct{}
			if inTurn {
				held = x.gate(1 << 20)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			first, second := x.openAt(ctx, t, d, 0), x.openAt(t.Context(), t, d, 0)
			var g errgroup.Group
			if inTurn {
				g.Go(func() error {
					_, err := io.Copy(io.Discard, first)
					return err
				})
				<-held
			}
			if name != "closed" {
				cancel(errStop)
			}
			if err := g.Wait(); inTurn && !errors.Is(err, errStop) {
				t.Errorf("the first reader: error %v", err)
			}
			first.Close()
			if _, err := first.Read(make([]byte, 1)); err == nil {
				t.Error("a read after Close succeeded")
			}
			got, err := io.ReadAll(second)
			if err := errors.Join(err, second.Close()); err != nil || !bytes.Equal(got, data) {
				t.Errorf("the second reader got %d bytes, error %v", len(got), err)
			}
			cancel(errStop)
			want := []int64{0}
			if inTurn {
				want = append(want, 1<<20)
			}
			if !slices.Equal(x.from, want) {
				t.Errorf("fetches from %d, want %d", x.from, want)
			}
			x.wantSound(t)
		})
	}
}

// TestCancelledAsBytesCome: the bytes of a turn whose context ends with them are neither lost nor
// delivered twice.
func TestCancelledAsBytesCome(t *testing.T) {
	for _, after := range []int64{2 << 20, 3 << 20} {
		x := start(t, 64<<20)
		d, data := x.blob(t, 3<<20)
		ctx, cancel := context.WithCancelCause(t.Context())
		x.source.Store = &hooked{Store: x.source.Store, after: after, hook: func(ended context.Context) {
			cancel(errStop)
			<-ended.Done()
		}}
		first, second := x.openAt(ctx, t, d, 0), x.openAt(t.Context(), t, d, 0)
		if _, err := io.Copy(io.Discard, first); !errors.Is(err, errStop) {
			t.Errorf("the first reader: error %v", err)
		}
		first.Close()
		var got bytes.Buffer
		_, err := io.CopyBuffer(struct{ io.Writer }{&got}, second, make([]byte, 1<<20))
		if err := errors.Join(err, second.Close()); err != nil || !bytes.Equal(got.Bytes(), data) {
			t.Errorf("the second reader got %d bytes, error %v", got.Len(), err)
		}
		x.wantSound(t)
	}
}

// hooked is a store whose first reader calls the hook as it returns the bytes from after on.
type hooked struct {
	cas.Store
	after int64
	hook  func(context.Context)
	opens atomic.Int64
}

func (h *hooked) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := h.Store.Open(ctx, d, offset)
	if err != nil || h.opens.Add(1) > 1 {
		return r, err
	}
	at := offset
	return struct {
		io.Reader
		io.Closer
	}{readerFunc(func(p []byte) (int, error) {
		if at == h.after-1<<20 {
			p = p[:min(len(p), 700<<10)] // so that the next turn begins elsewhere than a message does
		}
		n, err := r.Read(p)
		if at += int64(n); at > h.after-1<<20 && h.hook != nil {
			h.hook(ctx)
			h.hook = nil
		}
		return n, err
	}), r}, nil
}

// TestReadOfABadSource: what a store does wrong reaches the reader as an error, never as the end, and
// does not become a file.
func TestReadOfABadSource(t *testing.T) {
	broken := errors.New("the source failed")
	for name, test := range map[string]struct {
		fault castest.Fault
		want  error
	}{
		"fails":             {castest.Fault{After: -1, Err: broken}, broken},
		"fails midway":      {castest.Fault{After: 2 << 20, Err: broken}, broken},
		"truncates":         {castest.Fault{After: 2 << 20, Truncate: true}, cas.ErrMismatch},
		"truncates at once": {castest.Fault{Truncate: true}, cas.ErrMismatch},
		"lies":              {castest.Fault{After: 2 << 20, Lie: true}, cas.ErrMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			x := start(t, 64<<20)
			d, data := x.blob(t, 3<<20)
			x.source.Plan = func(castest.Op, digest.Digest) castest.Fault { return test.fault }
			r, err := x.Open(t.Context(), d, 0)
			var n int64
			if err == nil {
				n, err = io.Copy(io.Discard, r)
				r.Close()
			}
			if !errors.Is(err, test.want) || n >= d.Size() {
				t.Errorf("%d bytes, error %v, want %v", n, err, test.want)
			}
			x.wantSound(t)
			if files := x.files(); len(files) != 0 {
				t.Errorf("files %q", files)
			}
			x.source.Plan = nil
			x.read(t, d, 0, data)
		})
	}
}

// TestBrokenFileSystem: reads go on without the tier.
func TestBrokenFileSystem(t *testing.T) {
	t.Run("from the start", func(t *testing.T) {
		x := start(t, 64<<20)
		if err := os.RemoveAll(filepath.Join(x.dir, "tmp")); err != nil {
			t.Fatal(err)
		}
		d, data := x.blob(t, 3<<20)
		x.read(t, d, 0, data)
		x.wantOpens(t, 1)
		if err := os.Mkdir(filepath.Join(x.dir, "tmp"), 0o700); err != nil {
			t.Fatal(err)
		}
		x.wantSound(t)
	})
	t.Run("midway", func(t *testing.T) {
		x := start(t, 64<<20)
		d, data := x.blob(t, 3<<20)
		var readers []io.ReadCloser
		for range 3 {
			r := x.openAt(t.Context(), t, d, 0)
			if _, err := io.ReadFull(r, make([]byte, len(readers)<<19)); err != nil {
				t.Fatal(err)
			}
			readers = append(readers, r)
		}
		x.BreakFiles()
		for i, r := range readers {
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, data[i<<19:]) {
				t.Errorf("%d bytes, error %v", len(got), err)
			}
			r.Close()
		}
		x.wantSound(t)
	})
	t.Run("the source has other bytes", func(t *testing.T) {
		x := start(t, 64<<20)
		d, data := x.blob(t, 3<<20)
		r := x.openAt(t.Context(), t, d, 0)
		defer r.Close()
		if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		x.BreakFiles()
		data = bytes.Clone(data)
		data[0] ^= 1
		x.memory.Corrupt(d, data)
		if _, err := io.ReadAll(r); !errors.Is(err, cas.ErrMismatch) {
			t.Errorf("error %v, want ErrMismatch", err)
		}
	})
}

// TestRandomCancels: two hundred readers and links that give up at any time, of a source that stalls
// and fails, leave nothing.
func TestRandomCancels(t *testing.T) {
	x := start(t, 64<<20)
	type blob struct {
		d    digest.Digest
		data []byte
	}
	blobs := make([]blob, 40)
	for i := range blobs {
		blobs[i].d, blobs[i].data = x.blob(t, 100<<10+i*30000)
	}
	var calls atomic.Uint64
	x.source.Plan = func(_ castest.Op, d digest.Digest) castest.Fault {
		n := calls.Add(1)
		return castest.Fault{After: int64(n*7919) % d.Size(), Stall: n%3 == 0, Err: map[bool]error{true: cas.ErrUnavailable}[n%5 == 0]}
	}
	out := t.TempDir()
	var g errgroup.Group
	g.SetLimit(32)
	var whole atomic.Int64
	for i := range 200 {
		random := rand.New(rand.NewPCG(uint64(i), 3))
		b := blobs[random.IntN(len(blobs))]
		g.Go(func() error {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(random.IntN(20_000))*time.Microsecond, errStop)
			defer cancel()
			err := func() error {
				if i%4 == 0 {
					return x.Link(ctx, b.d, i%8 == 0, filepath.Join(out, fmt.Sprint(i)))
				}
				r, err := x.Open(ctx, b.d, 0)
				if err != nil {
					return err
				}
				defer r.Close()
				got, err := io.ReadAll(r)
				if err == nil && !bytes.Equal(got, b.data) {
					return errors.New("wrong bytes")
				}
				return err
			}()
			if err == nil {
				whole.Add(1)
			}
			if err == nil || errors.Is(err, errStop) || errors.Is(err, cas.ErrUnavailable) {
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%d of 200 came to their end", whole.Load())
	x.wantSound(t)
	x.source.Plan = nil
	for _, b := range blobs {
		x.read(t, b.d, 0, b.data)
	}
	x.wantSound(t)
}

// TestOneFetchForAllReaders: a hundred readers, one Open of the source.
func TestOneFetchForAllReaders(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 3<<20)
	var g errgroup.Group
	for range 100 {
		g.Go(func() error {
			r, err := x.Open(t.Context(), d, 0)
			if err != nil {
				return err
			}
			var got bytes.Buffer
			_, err = io.Copy(&got, r)
			if err == nil && !bytes.Equal(got.Bytes(), data) {
				err = errors.New("wrong bytes")
			}
			return errors.Join(err, r.Close())
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	x.wantOpens(t, 1)
	x.wantSound(t)
}
