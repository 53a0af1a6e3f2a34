package keymap_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/jetfarm/jetfarm/cas/keymap"
)

// A Map behaves like a Go map, whatever is done to it. Few different keys, so that removals meet long runs.
func TestMapIsAMap(t *testing.T) {
	for _, keys := range []int{3, 40, 3000} {
		r := rand.New(rand.NewPCG(1, uint64(keys)))
		var m keymap.Map
		want := make(map[keymap.Key]uint64)
		for step := range 60_000 {
			var k keymap.Key
			binary.BigEndian.PutUint64(k[:], r.Uint64N(uint64(keys)))
			switch r.IntN(6) {
			case 0, 1, 2:
				v := 1 + r.Uint64N(100)
				m.Set(k, v)
				want[k] = v
			case 3:
				m.Set(k, 0)
				delete(want, k)
			case 4:
				if got := m.Get(k); got != want[k] {
					t.Fatalf("step %d: %v is %d, want %d", step, k, got, want[k])
				}
			case 5:
				if r.IntN(500) == 0 {
					halve := func(_ keymap.Key, v uint64) uint64 { return v / 2 }
					m.Update(halve)
					for k, v := range want {
						if want[k] = v / 2; v/2 == 0 {
							delete(want, k)
						}
					}
				}
			}
			if m.Len() != len(want) {
				t.Fatalf("step %d: %d entries, want %d", step, m.Len(), len(want))
			}
		}
		got := make(map[keymap.Key]uint64)
		m.All(func(k keymap.Key, v uint64) { got[k] = v })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%d keys: entries (-want +got):\n%s", keys, diff)
		}
		for k, v := range want {
			if m.Get(k) != v {
				t.Fatalf("%d keys: %v is %d, want %d", keys, k, m.Get(k), v)
			}
		}
	}
}

func BenchmarkGet1000OfAMillion(b *testing.B) {
	const many = 1_000_000
	var m keymap.Map
	keys := make([]keymap.Key, many)
	for i := range keys {
		binary.BigEndian.PutUint64(keys[i][:], rand.Uint64())
		m.Set(keys[i], 1)
	}
	next := 0 // in the order of the keys, which is none in the table
	for b.Loop() {
		for range 1000 {
			if m.Get(keys[next]) == 0 {
				b.Fatal("a key is missing")
			}
			next = (next + 1) % many
		}
	}
}
