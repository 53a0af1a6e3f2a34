package disk_test

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
)

// TestResumedFetchIsHashed: a source that verifies its reads has not verified a fetch that it was asked
// for in two parts.
func TestResumedFetchIsHashed(t *testing.T) {
	x := start(t, 64<<20)
	x.believe(t, false)
	d, _ := x.blob(t, 3<<20)
	ctx, cancel := context.WithCancelCause(t.Context())
	x.source.Plan = func(castest.Op, digest.Digest) castest.Fault {
		if x.opens.Add(1) == 1 {
			return castest.Fault{}
		}
		return castest.Fault{After: 1 << 10, Lie: true}
	}
	x.source.Store = &hooked{Store: x.source.Store, after: 2 << 20, hook: func(ended context.Context) {
		cancel(errStop)
		<-ended.Done()
	}}
	first, second := x.openAt(ctx, t, d, 0), x.openAt(t.Context(), t, d, 0)
	if _, err := io.Copy(io.Discard, first); !errors.Is(err, errStop) {
		t.Errorf("the first reader: error %v", err)
	}
	first.Close()
	n, err := io.Copy(io.Discard, second)
	if second.Close(); !errors.Is(err, cas.ErrMismatch) || n >= d.Size() {
		t.Errorf("the second reader got %d bytes, error %v, want %v", n, err, cas.ErrMismatch)
	}
	if files := x.files(); len(files) != 0 {
		t.Errorf("files %q", files)
	}
	x.wantOpens(t, 2)
}

// believe makes the tier one over a source that verifies what it reads.
func (x *fixture) believe(t testing.TB, second bool) {
	t.Helper()
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	x.Tier, err = disk.Open(t.Context(), disk.Config{
		Dir: x.dir, MaxBytes: 64 << 20, Source: x.source, Verified: true, SecondRead: second, Log: discard(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
}

// TestLargeBlobsFillAtOnce: beside the read of a large blob its file costs little, whatever the source.
func TestLargeBlobsFillAtOnce(t *testing.T) {
	x := start(t, 64<<20)
	x.believe(t, true)
	d, data := x.blob(t, 4<<20)
	x.read(t, d, 0, data)
	x.read(t, d, 0, data)
	x.wantOpens(t, 1)
	x.wantSound(t)
}
