package memory_test

import (
	"bytes"
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/memory"
	"github.com/jetfarm/jetfarm/cas/pack"
)

// packed returns a tier of so much memory with a pack in dir.
func packed(t testing.TB, dir string, maxBytes int64, source cas.Store) (tier *memory.Tier, done func()) {
	t.Helper()
	p, err := pack.Open(t.Context(), pack.Config{Dir: dir, MaxBytes: pack.MinBytes, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	tier, err = memory.New(memory.Config{MaxBytes: maxBytes, Pack: p, Source: source})
	if err != nil {
		t.Fatal(err)
	}
	return tier, func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestConformanceWithAPack(t *testing.T) {
	for name, bytes := range map[string]int64{"no memory": 0, "tight": 100 << 10} {
		t.Run(name, func(t *testing.T) {
			open := func(source cas.Store) func(tb testing.TB) cas.Store {
				return func(tb testing.TB) cas.Store {
					tb.Helper()
					tier, done := packed(tb, tb.TempDir(), bytes, source)
					tb.Cleanup(done)
					return tier
				}
			}
			castest.Run(t, open(castest.NewMemory()))
			castest.RunFrames(t, open(castest.NewMemory()))
			castest.RunResumer(t, open(castest.NewResumable()))
		})
	}
}

// What was put or read once is read from the pack from then on, also after a restart.
func TestPackAnswersForTheSource(t *testing.T) {
	dir, space := t.TempDir(), castest.Space(t, "")
	source := castest.NewMemory()
	put := func(n int) (ds []digest.Digest, data [][]byte) {
		for range n {
			d, b := castest.Blob(space, 3000)
			ds, data = append(ds, d), append(data, b)
		}
		return ds, data
	}
	ds, data := put(9)
	for i := range 6 { // of these, the source has what is read
		if err := source.Put(t.Context(), ds[i], bytes.NewReader(data[i])); err != nil {
			t.Fatal(err)
		}
	}
	tier, done := packed(t, dir, 0, source)
	read := func(tier *memory.Tier) {
		t.Helper()
		got, errs := tier.ReadBatch(t.Context(), ds)
		for i, d := range ds {
			if errs[i] != nil {
				t.Fatalf("ReadBatch of blob %d: %v", i, errs[i])
			}
			single, err := cas.ReadAll(t.Context(), tier, d, 3000)
			if err != nil {
				t.Fatalf("read of blob %d: %v", i, err)
			}
			if !cmp.Equal(got[i], data[i]) || !cmp.Equal(single, data[i]) {
				t.Fatalf("blob %d is wrong", i)
			}
		}
	}
	if _, errs := tier.ReadBatch(t.Context(), ds[:3]); errs[0] != nil || errs[1] != nil || errs[2] != nil {
		t.Fatal(errs)
	}
	for i := 3; i < 6; i++ {
		if _, err := cas.ReadAll(t.Context(), tier, ds[i], 3000); err != nil {
			t.Fatal(err)
		}
	}
	if err := tier.Put(t.Context(), ds[6], bytes.NewReader(data[6])); err != nil {
		t.Fatal(err)
	}
	for i, err := range tier.PutBatch(t.Context(), ds[7:], data[7:]) {
		if err != nil {
			t.Fatalf("PutBatch of blob %d: %v", i, err)
		}
	}
	for _, d := range ds {
		source.Remove(d)
	}
	read(tier)
	done()
	tier, done = packed(t, dir, 1<<20, source)
	defer done()
	read(tier)

	missing, err := tier.Missing(t.Context(), ds)
	if err != nil || len(missing) != len(ds) {
		t.Errorf("%d blobs are missing, error %v: only the source may tell what there is", len(missing), err)
	}
}
