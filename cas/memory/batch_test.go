package memory_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/memory"
)

// What a batch stores or reads is held afterwards, and nothing that failed is.
func TestBatch(t *testing.T) {
	x := start(t, 64<<20)
	space := castest.Space(t, "batch")
	var ds []digest.Digest
	var data [][]byte
	for _, size := range []int{1, 1000, memory.MaxBlob, memory.MaxBlob + 1} {
		d, blob := castest.Blob(space, size)
		ds, data = append(ds, d), append(data, blob)
	}
	bad, blob := castest.Blob(space, 100)
	ds, data = append(ds, bad), append(data, blob[1:])
	last := len(ds) - 1
	for i, err := range x.PutBatch(t.Context(), ds, data) {
		if (i == last) != errors.Is(err, cas.ErrMismatch) || (i != last && err != nil) {
			t.Errorf("put of %v: error %v", ds[i], err)
		}
	}
	message := bytes.Clone(data[0])
	data[0][0] ^= 1 // the caller's bytes are its own again
	data[0] = message
	for _, opens := range []int64{2, 2} { // the large one and the absent one
		before := x.opens.Load()
		got, errs := x.ReadBatch(t.Context(), ds)
		for i := range ds {
			if i == last {
				if !errors.Is(errs[i], cas.ErrNotFound) {
					t.Errorf("read of what was not stored: error %v", errs[i])
				}
			} else if errs[i] != nil || !bytes.Equal(got[i], data[i]) {
				t.Errorf("read of %v: %d bytes, error %v", ds[i], len(got[i]), errs[i])
			}
		}
		if n := x.opens.Load() - before; n != opens {
			t.Errorf("the source was opened %d times, want %d", n, opens)
		}
	}
	d, stored := x.blob(t, 500)
	if got, errs := x.ReadBatch(t.Context(), []digest.Digest{d}); errs[0] != nil || !bytes.Equal(got[0], stored) {
		t.Errorf("%d bytes, error %v", len(got[0]), errs[0])
	}
	x.want(t, d, stored, 0)
}
