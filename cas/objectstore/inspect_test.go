package objectstore_test

import (
	"errors"
	"strconv"
	"strings"
	"testing"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

func TestWalkAndStat(t *testing.T) {
	s := open(t, config(t, brokertest.Start(t)))
	want := make(map[digest.Digest]bool)
	put := func(instance string, data []byte) digest.Digest {
		d, err := cas.PutBytes(t.Context(), s, castest.Space(t, instance), data)
		if err != nil {
			t.Fatal(err)
		}
		want[d] = true
		return d
	}
	var one digest.Digest
	for i := range 500 {
		one = put("", []byte("small "+strconv.Itoa(i)))
	}
	large := put("", make([]byte, 1<<20))
	put("other", make([]byte, 1<<20))

	walk := func(prefix string) map[digest.Digest]bool {
		got := make(map[digest.Digest]bool)
		err := s.Walk(t.Context(), prefix, func(b objectstore.Blob) error {
			if got[b.Digest] || b.Generation != 1 || b.Stream == "" {
				t.Errorf("%+v, again %t", b, got[b.Digest])
			}
			got[b.Digest] = true
			return nil
		})
		if err != nil {
			t.Fatalf("Walk: %v", err)
		}
		return got
	}
	for _, prefix := range []string{"", one.Hash()[:1], one.Hash()[:2], one.Hash()[:7], one.Hash(), large.Hash()[:3]} {
		got := walk(prefix)
		for d := range want {
			if got[d] != strings.HasPrefix(d.Hash(), prefix) {
				t.Errorf("prefix %q: %v is listed: %t", prefix, d, got[d])
			}
		}
		for d := range got {
			if !want[d] {
				t.Errorf("prefix %q: %v is listed, which was not stored", prefix, d)
			}
		}
	}
	enough := errors.New("enough")
	calls := 0
	err := s.Walk(t.Context(), "", func(objectstore.Blob) error {
		calls++
		return enough
	})
	if !errors.Is(err, enough) || calls != 1 {
		t.Errorf("error %v after %d calls", err, calls)
	}

	if n := s.Counts()[1]; n != len(want) {
		t.Errorf("%d blobs are counted, want %d", n, len(want))
	}
	other := open(t, config(t, brokertest.Start(t)))
	for d := range want {
		b, err := s.Stat(t.Context(), d)
		if err != nil || b.Digest != d || b.Generation != 1 {
			t.Errorf("Stat: %+v, %v", b, err)
		}
		if _, err := other.Stat(t.Context(), d); !errors.Is(err, cas.ErrNotFound) {
			t.Errorf("Stat elsewhere: error %v", err)
		}
		break
	}

	if err := s.Remove(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(t.Context(), one); !errors.Is(err, cas.ErrNotFound) {
		t.Errorf("a removed blob: error %v", err)
	}
	if _, err := s.Open(t.Context(), one, 0); !errors.Is(err, cas.ErrNotFound) {
		t.Errorf("a removed blob is read: error %v", err)
	}
	if err := s.Remove(t.Context(), large); err == nil {
		t.Error("a large blob was removed")
	}
}
