package disk_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
)

func TestBatches(t *testing.T) {
	x := start(t, 64<<20)
	var ds []digest.Digest
	var want [][]byte
	for _, size := range []int{0, 1, 1000, disk.Smallest, disk.Smallest + 1, 300 << 10} {
		d, data := castest.Blob(castest.Space(t, ""), size)
		ds, want = append(ds, d), append(want, data)
	}
	for i, err := range x.PutBatch(t.Context(), ds, want) {
		if err != nil {
			t.Errorf("PutBatch of %d bytes: %v", len(want[i]), err)
		}
	}
	held, heldData := x.blob(t, 2000)
	x.link(t, held, true, heldData)
	x.memory.Remove(held)
	absent, _ := castest.Blob(castest.Space(t, ""), 100)
	ds, want = append(ds, held, absent), append(want, heldData, nil)
	data, errs := x.ReadBatch(t.Context(), ds)
	for i, d := range ds {
		if d == absent {
			if !errors.Is(errs[i], cas.ErrNotFound) {
				t.Errorf("an absent blob: error %v", errs[i])
			}
		} else if errs[i] != nil || !bytes.Equal(data[i], want[i]) {
			t.Errorf("%v: %d bytes, error %v", d, len(data[i]), errs[i])
		}
	}
	x.wantSound(t)
}

// framed is a store that has frames, for as long as it has the blob.
type framed struct {
	*castest.Memory
	opens int
}

func (f *framed) OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	f.opens++
	return cas.OpenFrames(ctx, f.Memory, d, offset)
}

// TestFramesOfTheSource: they are taken before files are compressed, and files when there are none.
func TestFramesOfTheSource(t *testing.T) {
	x := start(t, 64<<20)
	source := &framed{Memory: x.memory}
	tier, err := disk.Open(t.Context(), disk.Config{Dir: t.TempDir(), MaxBytes: 64 << 20, Source: source, Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	defer tier.Close()
	d, data := x.blob(t, 1<<20)
	read := func() ([]byte, error) {
		r, err := tier.OpenFrames(t.Context(), d, 0)
		if err != nil {
			return nil, err
		}
		frames, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil {
			return nil, err
		}
		return compress.Decode(nil, frames, d.Size())
	}
	check := func() {
		t.Helper()
		if got, err := read(); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, error %v", len(got), err)
		}
	}
	check()
	if _, err := cas.ReadAll(t.Context(), tier, d, d.Size()); err != nil {
		t.Fatal(err)
	}
	check()
	if source.opens != 2 {
		t.Errorf("%d reads of frames of the source, want 2", source.opens)
	}
	x.memory.Remove(d)
	check()
	absent, _ := castest.Blob(d.Space(), 1000)
	if _, err := tier.OpenFrames(t.Context(), absent, 0); !errors.Is(err, cas.ErrNotFound) {
		t.Errorf("frames of an absent blob: error %v", err)
	}
}
