package castest

import (
	"errors"
	"testing"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// testSizer is the contract of cas.Sizer, for the stores that are one.
func testSizer(t *testing.T, s cas.Store) {
	if _, ok := s.(cas.Sizer); !ok {
		return
	}
	space, other := unused(t), unused(t)
	for _, size := range sizes() {
		d, _ := added(t, s, space, size)
		if got, err := cas.Find(t.Context(), s, space, d.Hash()); err != nil || got != d {
			t.Errorf("Find of a blob of %d bytes: %v, %v, want %v", size, got, err, d)
		}
		if got, err := cas.Find(t.Context(), s, other, d.Hash()); !errors.Is(err, cas.ErrNotFound) {
			t.Errorf("Find in another space: %v, %v, want ErrNotFound", got, err)
		}
	}
	absent, _ := Blob(space, 100)
	if got, err := cas.Find(t.Context(), s, space, absent.Hash()); !errors.Is(err, cas.ErrNotFound) {
		t.Errorf("Find of an absent blob: %v, %v, want ErrNotFound", got, err)
	}
	empty := space.Of(nil)
	if got, err := cas.Find(t.Context(), s, space, empty.Hash()); err != nil || got != empty {
		t.Errorf("Find of the empty blob: %v, %v", got, err)
	}
	for _, hash := range []string{"", "x", absent.Hash()[1:], absent.Hash() + "0"} {
		if got, err := cas.Find(t.Context(), s, space, hash); !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("Find of %q: %v, %v, want ErrInvalid", hash, got, err)
		}
	}
}
