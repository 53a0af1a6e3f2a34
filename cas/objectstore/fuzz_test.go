package objectstore_test

import (
	"bytes"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/jetfarm/jetfarm/cas/objectstore"
)

const fuzzHash = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"

func FuzzSubjects(f *testing.F) {
	f.Add("2c.sha256." + fuzzHash + "-5")
	f.Add("2c.sha256-eA." + fuzzHash + "-5")
	f.Add("2c.sha256." + fuzzHash + "-5.upload")
	f.Add("2d.sha256." + fuzzHash + "-5")
	f.Add("2c.sha256." + fuzzHash + "-05")
	f.Add("YmxvYnMvMmNmMjRkYmE1ZmIwYTMwZTI2ZTgzYjJhYzViOWUyOWUxYjE2MWU1YzFmYTc0MjVlNzMwNDMzNjI5MzhiOTgyNC81")
	f.Add("OBJ_cas-s-1-0")
	f.Add("OBJ_cas-l-4294967296-0")
	f.Fuzz(func(t *testing.T, s string) {
		for name, parse := range map[string]func(string) (string, bool){
			"chunk": objectstore.ParseChunkSubject, "metadata": objectstore.ParseMetaSubject, "stream": objectstore.ParseStream,
		} {
			if again, ok := parse(s); ok && again != s {
				t.Errorf("%s %q reads back as %q", name, s, again)
			}
		}
	})
}

func FuzzAnnouncement(f *testing.F) {
	f.Add([]byte{1})
	f.Add(append([]byte{1}, make([]byte, 8+24)...))
	f.Add(append([]byte{2}, make([]byte, 8+48)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		if again, ok := objectstore.DecodeNews(data); ok && !bytes.Equal(again, data) {
			t.Errorf("%x reads back as %x", data, again)
		}
	})
}

func FuzzObject(f *testing.F) {
	good, err := objectstore.EncodeObject(fuzzHash, 3<<19, []uint64{7, 8, 1 << 40})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(int64(3<<19), good)
	f.Add(int64(3<<19), bytes.Replace(good, []byte("7,1,"), []byte("7,0,"), 1))
	f.Add(int64(3<<19), bytes.Replace(good, []byte("7,1,"), []byte("7,1,1,"), 1))
	f.Add(int64(3<<19), bytes.Replace(good, []byte("7,1,"), []byte("7,3w5e11264sgsf,"), 1))
	f.Add(int64(3<<19), []byte(`{"deleted":true}`))
	f.Fuzz(func(t *testing.T, size int64, data []byte) {
		if size <= 0 || size > 1<<30 {
			t.Skip()
		}
		positions, err := objectstore.DecodeObject(fuzzHash, size, data)
		if err != nil {
			return
		}
		if int64(len(positions)) != (size+1<<19-1)>>19 || !slices.IsSorted(positions) {
			t.Errorf("%d bytes have positions %v", size, positions)
		}
	})
}

// The largest blob with the worst interleaving still has metadata that fits a message.
func TestObjectMetadata(t *testing.T) {
	const chunks = 1 << 18
	positions := make([]uint64, chunks)
	for i := range positions {
		positions[i] = math.MaxInt64/2 + uint64(i)*1000
	}
	data, err := objectstore.EncodeObject(fuzzHash, chunks<<19, positions)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > 1<<20 {
		t.Errorf("metadata has %d bytes, more than a message", len(data))
	}
	got, err := objectstore.DecodeObject(fuzzHash, chunks<<19, data)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, positions) {
		t.Error("positions read back differ")
	}

	three, err := objectstore.EncodeObject(fuzzHash, 3<<19, []uint64{5, 6, 9})
	if err != nil {
		t.Fatal(err)
	}
	for old, changed := range map[string]string{
		`"5,1,3"`: `"5,1"`, `,1,3"`: `,1,3,1"`, `5,1`: `5,0`, `"5,`: `"-5,`, `"size":`: `"size":1`, `"nuid":"2c.`: `"nuid":"2d.`, `{"name"`: `{"deleted":true,"name"`,
	} {
		if !strings.Contains(string(three), old) {
			t.Fatalf("%s has no %s", three, old)
		}
		if got, err := objectstore.DecodeObject(fuzzHash, 3<<19, []byte(strings.Replace(string(three), old, changed, 1))); err == nil {
			t.Errorf("metadata with %s in place of %s has positions %v", changed, old, got)
		}
	}
	if got, err := objectstore.DecodeObject(fuzzHash, 3<<19, three); err != nil || !cmp.Equal(got, []uint64{5, 6, 9}) {
		t.Errorf("positions %v, error %v", got, err)
	}
}
