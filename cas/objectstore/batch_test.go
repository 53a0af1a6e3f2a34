package objectstore_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// mixedBatch is blobs of all kinds and how storing and then reading them ends.
func mixedBatch(t testing.TB) (ds []digest.Digest, data [][]byte, put, read []error) {
	t.Helper()
	space := castest.Space(t, "")
	add := func(d digest.Digest, blob []byte, onPut, onRead error) {
		ds, data, put, read = append(ds, d), append(data, blob), append(put, onPut), append(read, onRead)
	}
	for range 600 { // more than one window
		d, blob := castest.Blob(space, 100)
		add(d, blob, nil, nil)
	}
	for _, size := range []int{1, 512 << 10, 512<<10 + 1, 3 << 20} {
		d, blob := castest.Blob(castest.Space(t, "batch"), size)
		add(d, blob, nil, nil)
		add(d, blob, nil, nil) // twice
	}
	for _, size := range []int{1 << 10, 600 << 10} {
		d, blob := castest.Blob(space, size)
		wrong := bytes.Clone(blob)
		wrong[0] ^= 1
		add(d, wrong, cas.ErrMismatch, cas.ErrNotFound)
		d, blob = castest.Blob(space, size)
		add(d, blob[1:], cas.ErrMismatch, cas.ErrNotFound)
	}
	add(space.Of(nil), nil, nil, nil)
	impossible, err := space.New(space.Function().Empty(), 1)
	if err != nil {
		t.Fatal(err)
	}
	add(impossible, []byte("x"), cas.ErrMismatch, cas.ErrNotFound)
	return ds, data, put, read
}

func TestBatch(t *testing.T) {
	f := brokertest.Start(t)
	s, other := running(t, config(t, f)), open(t, config(t, f)) // the other one does not know what is stored
	ds, data, onPut, onRead := mixedBatch(t)
	for range 2 { // new, and known
		for i, err := range s.PutBatch(t.Context(), ds, data) {
			if !errors.Is(err, onPut[i]) {
				t.Errorf("put of %v: error %v, want %v", ds[i], err, onPut[i])
			}
		}
		for _, reader := range []*objectstore.Store{s, other} {
			got, errs := reader.ReadBatch(t.Context(), ds)
			for i := range ds {
				if !errors.Is(errs[i], onRead[i]) || (errs[i] == nil && !bytes.Equal(got[i], data[i])) || (errs[i] != nil && got[i] != nil) {
					t.Errorf("read of %v: %d bytes, error %v, want %v", ds[i], len(got[i]), errs[i], onRead[i])
				}
			}
		}
	}
}

// What another process stored is found by a batch that stores it again, and its broker is not asked
// to store it twice.
func TestBatchOfWhatIsThere(t *testing.T) {
	f := brokertest.Start(t)
	s, other := open(t, config(t, f)), open(t, config(t, f))
	var ds []digest.Digest
	var data [][]byte
	for range 10 {
		d, blob := castest.Blob(castest.Space(t, ""), 1000)
		ds, data = append(ds, d), append(data, blob)
	}
	for _, store := range []*objectstore.Store{s, other} {
		if err := errors.Join(store.PutBatch(t.Context(), ds, data)...); err != nil {
			t.Fatal(err)
		}
		if got := missing(t, store, ds...); len(got) != 0 {
			t.Errorf("%d blobs are missing", len(got))
		}
	}
	if got := streamState(t, f.Connect(t), smallStream).Msgs; got != 20 {
		t.Errorf("%d messages, want 20", got)
	}
}

// One damaged and one lost blob do not spoil the others.
func TestBatchReadOfDamagedBlobs(t *testing.T) {
	f := brokertest.Start(t)
	cfg := config(t, f)
	cfg.Log = quiet()
	s := open(t, cfg)
	var ds []digest.Digest
	for range 10 {
		d, _ := stored(t, s, 1000)
		ds = append(ds, d)
	}
	subject := func(i int) string {
		return "$O.cas-s-1-0.C." + ds[i].Hash()[:2] + ".sha256." + ds[i].Hash() + "-1000"
	}
	rewrite(t, f, smallStream, subject(3), flipLast)
	rewrite(t, f, smallStream, subject(5), func([][]byte) [][]byte { return nil })
	data, errs := s.ReadBatch(t.Context(), ds)
	for i := range ds {
		want := map[int]error{3: cas.ErrMismatch, 5: cas.ErrNotFound}[i]
		if !errors.Is(errs[i], want) || (want == nil) != (len(data[i]) == 1000) {
			t.Errorf("blob %d: %d bytes, error %v, want %v", i, len(data[i]), errs[i], want)
		}
	}
	if got := missing(t, s, ds...); len(got) != 2 {
		t.Errorf("%d blobs are missing afterwards, want 2", len(got))
	}
}

// A broker that goes silent costs a batch one bound, not one for each blob.
func TestBatchBlackhole(t *testing.T) {
	f := brokertest.Start(t)
	p := newProxy(t, f)
	const stall = 300 * time.Millisecond
	s := open(t, objectstore.Config{
		Small: p.connect(t), Bulk: p.connect(t), Log: quiet(), StallTimeout: stall, RequestTimeout: stall,
	})
	var ds, fresh []digest.Digest
	var data [][]byte
	for range 600 {
		d, _ := stored(t, s, 100)
		ds = append(ds, d)
		d, blob := castest.Blob(castest.Space(t, ""), 100)
		fresh, data = append(fresh, d), append(data, blob)
	}
	p.silent.Store(true)
	within(t, stall, "ReadBatch", cas.ErrUnavailable, func() error {
		_, errs := s.ReadBatch(t.Context(), ds)
		return firstAndCount(t, errs, 600)
	})
	within(t, stall, "PutBatch", cas.ErrUnavailable, func() error {
		return firstAndCount(t, s.PutBatch(t.Context(), fresh, data), 600)
	})
	within(t, 0, "PutBatch that ends", errStop, func() error {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errStop)
		defer cancel()
		return firstAndCount(t, s.PutBatch(ctx, fresh, data), 600)
	})
	within(t, 0, "ReadBatch that ends", errStop, func() error {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errStop)
		defer cancel()
		_, errs := s.ReadBatch(ctx, ds)
		return firstAndCount(t, errs, 600)
	})
}

// firstAndCount returns the first error of a batch in which want calls failed.
func firstAndCount(t testing.TB, errs []error, want int) error {
	t.Helper()
	var first error
	for _, err := range errs {
		if err == nil {
			want++
		} else if first == nil {
			first = err
		}
	}
	if want != len(errs) {
		t.Errorf("%d of %d calls succeeded, want none", want-len(errs), len(errs))
	}
	return first
}

// A small stream takes what fits, and every blob of a batch says whether it did.
func TestBatchIntoFullStore(t *testing.T) {
	f := brokertest.Start(t)
	cfg := config(t, f)
	cfg.MaxBytes = 1 << 20
	s := open(t, cfg)
	var ds []digest.Digest
	var data [][]byte
	for range 20 {
		d, blob := castest.Blob(castest.Space(t, ""), 100<<10)
		ds, data = append(ds, d), append(data, blob)
	}
	full := 0
	for i, err := range s.PutBatch(t.Context(), ds, data) {
		_, read := s.Open(t.Context(), ds[i], 0)
		switch {
		case err == nil && read == nil:
		case errors.Is(err, cas.ErrFull) && errors.Is(read, cas.ErrNotFound):
			full++
		default:
			t.Errorf("blob %d: put %v, open %v", i, err, read)
		}
	}
	if full == 0 || full == len(ds) {
		t.Errorf("%d of %d blobs did not fit", full, len(ds))
	}
	if got := streamState(t, f.Connect(t), smallStream).Msgs; got%2 != 0 {
		t.Errorf("%d messages, want pairs of chunk and metadata", got)
	}
}
