package chunking_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/jetfarm/jetfarm/cas/chunking"
)

// noise is the same at every run.
func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b) //nolint:errcheck // It has none.
	return b
}

// lengths cuts data as a whole.
func lengths(c *chunking.Chunker, data []byte) []int {
	var out []int
	for len(data) > 0 {
		n := c.Cut(data)
		out = append(out, n)
		data = data[n:]
	}
	return out
}

// TestOtherImplementations compares with what implementations of FastCDC 2020 in Rust and Python find
// in the same bytes, a megabyte of a linear congruential generator, at normalization 1. (REAPI's own
// vectors are over a picture that cannot be made.)
func TestOtherImplementations(t *testing.T) {
	data := make([]byte, 1<<20)
	state := uint64(0x4d595df4d0f33173)
	for i := range data {
		state = state*6364136223846793005 + 1442695040888963407
		data[i] = byte(state >> 37)
	}
	for seed, want := range map[uint64][]int{
		0: {94_129, 73_623, 28_537, 107_508, 87_622, 224_123, 45_882, 98_297, 40_690, 69_224, 121_633, 57_308},
		7: {
			38_508, 66_500, 109_559, 79_560, 87_748, 95_882, 86_696, 53_024,
			87_355, 46_926, 103_947, 22_388, 92_486, 69_996, 8_001,
		},
	} {
		c := chunking.NewLevel(16<<10, 64<<10, 256<<10, seed, 1)
		if diff := cmp.Diff(want, lengths(c, data)); diff != "" {
			t.Errorf("seed %d (-want +got):\n%s", seed, diff)
		}
	}
}

// TestGolden freezes the cuts of the parameters that are advertised: other cuts would make everything
// that was chunked before worthless.
func TestGolden(t *testing.T) {
	data := noise(8<<20, 1)
	want := []int{
		549797, 175236, 206986, 533292, 600040, 759102, 460556, 543220,
		669465, 531332, 777865, 535970, 582367, 621128, 635711, 206541,
	}
	if diff := cmp.Diff(want, lengths(chunking.New(chunking.Params{Average: 512 << 10}), data)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestChunks(t *testing.T) {
	for _, p := range []chunking.Params{
		{Average: chunking.MinAverage}, {Average: 4 << 10, Seed: 5}, {Average: 64 << 10}, {Average: 512 << 10}, {Average: 1 << 20, Seed: 1<<32 - 1},
	} {
		c := chunking.New(p)
		for _, size := range []int{0, 1, p.Min() - 1, p.Min(), p.Min() + 1, p.Average + 1, p.Max() - 1, p.Max(), p.Max() + 1, 2*p.Max() + 3, 200_001} {
			for content, data := range map[string][]byte{"noise": noise(size, 2), "zeros": make([]byte, size)} {
				cuts := lengths(c, data)
				total := 0
				for i, n := range cuts {
					total += n
					if n <= 0 || n > p.Max() || (n < p.Min() && i+1 < len(cuts)) {
						t.Errorf("%+v: chunk %d of %d bytes of %s has %d", p, i, size, content, n)
					}
				}
				if total != size {
					t.Errorf("%+v: the chunks of %d bytes of %s have %d", p, size, content, total)
				}
				if content == "zeros" && size > p.Max() && cuts[0] != p.Max() {
					t.Errorf("%+v: zeros are cut after %d bytes", p, cuts[0])
				}
				for _, hint := range []int64{0, 1, int64(size), 1 << 40} {
					var got []int
					whole := sha256.New()
					err := c.Split(iotest.HalfReader(bytes.NewReader(data)), hint, func(chunk []byte) error {
						got = append(got, len(chunk))
						whole.Write(chunk)
						return nil
					})
					if err != nil || !slices.Equal(got, cuts) || [32]byte(whole.Sum(nil)) != sha256.Sum256(data) {
						t.Errorf("%+v: Split of %d bytes of %s (hint %d): %d chunks of %d, %v", p, size, content, hint, len(got), len(cuts), err)
					}
				}
			}
		}
	}
}

// TestLocality: a blob that differs in one place has nearly all chunks in common.
func TestLocality(t *testing.T) {
	c := chunking.New(chunking.Params{Average: 16 << 10})
	data := noise(8<<20, 3)
	sums := func(data []byte) map[[32]byte]bool {
		out := make(map[[32]byte]bool)
		for _, n := range lengths(c, data) {
			out[sha256.Sum256(data[:n])] = true
			data = data[n:]
		}
		return out
	}
	before := sums(data)
	average := len(data) / len(before)
	if average < 12<<10 || average > 24<<10 {
		t.Errorf("chunks have %d bytes on average", average)
	}
	for name, other := range map[string][]byte{
		"a byte more":      slices.Insert(slices.Clone(data), 4<<20, 'x'),
		"a byte less":      slices.Delete(slices.Clone(data), 4<<20, 4<<20+1),
		"more in front":    append(noise(100_000, 4), data...),
		"a part cut out":   slices.Delete(slices.Clone(data), 3<<20, 4<<20),
		"another at a bit": append(append(slices.Clone(data[:5<<20]), data[5<<20]^1), data[5<<20+1:]...),
	} {
		shared := 0
		after := sums(other)
		for sum := range after {
			if before[sum] {
				shared++
			}
		}
		if lost := len(after) - shared; lost > 12 {
			t.Errorf("%s: %d of %d chunks are new", name, lost, len(after))
		}
	}
}

func TestErrors(t *testing.T) {
	c := chunking.New(chunking.Params{Average: 1 << 10})
	fail := errors.New("failed")
	for _, fail := range []error{fail, io.ErrUnexpectedEOF} {
		for _, n := range []int{0, 100, 100_000} {
			err := c.Split(io.MultiReader(bytes.NewReader(noise(n, 1)), iotest.ErrReader(fail)), 200_000, func([]byte) error { return nil })
			if err != fail { //nolint:errorlint // As it is.
				t.Errorf("a source that fails after %d bytes: error %v, want %v", n, err, fail)
			}
		}
	}
	calls := 0
	err := c.Split(bytes.NewReader(noise(100_000, 1)), 100_000, func([]byte) error {
		calls++
		return fail
	})
	if err != fail || calls != 1 { //nolint:errorlint // As it is.
		t.Errorf("a sink that fails: error %v after %d calls", err, calls)
	}
	for _, average := range []int{0, -1024, 512, 1000, 3 << 10, 8<<20 + 1, 16 << 20} {
		if err := (chunking.Params{Average: average}).Validate(); !errors.Is(err, chunking.ErrInvalid) {
			t.Errorf("CAP-18: an average of %d: %v", average, err)
		}
	}
}

func FuzzCut(f *testing.F) {
	f.Add(noise(5000, 1), uint32(0))
	f.Add(make([]byte, 9000), uint32(3))
	f.Fuzz(func(t *testing.T, data []byte, seed uint32) {
		p := chunking.Params{Average: 1 << 10, Seed: seed}
		c := chunking.New(p)
		cuts := lengths(c, data)
		var got []int
		if err := c.Split(bytes.NewReader(data), 0, func(chunk []byte) error {
			got = append(got, len(chunk))
			return nil
		}); err != nil || !slices.Equal(got, cuts) {
			t.Errorf("Split: %v, %v, want %v", got, err, cuts)
		}
		for i, n := range cuts {
			if n > p.Max() || (n < p.Min() && i+1 < len(cuts)) {
				t.Errorf("chunk %d of %d has %d bytes", i, len(cuts), n)
			}
		}
	})
}

func BenchmarkSplit(b *testing.B) {
	c := chunking.New(chunking.Params{Average: 512 << 10})
	data := noise(32<<20, 1)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Split(bytes.NewReader(data), int64(len(data)), func([]byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
