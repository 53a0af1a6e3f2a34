package disk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

var errStop = errors.New("the test ended this context")

// gate holds the first fetch of a blob after n bytes until it ends. The channel is closed when it is
// held.
func (x *fixture) gate(n int64) (held chan struct{}) {
	held = make(chan struct{})
	x.source.Store = &gated{Store: x.source.Store, after: n, held: held}
	return held
}

// gated is a store whose first reader stalls.
type gated struct {
	cas.Store
	after int64
	held  chan struct{}
	opens atomic.Int64
}

func (g *gated) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := g.Store.Open(ctx, d, offset)
	if err != nil || g.opens.Add(1) > 1 {
		return r, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(io.LimitReader(r, g.after), readerFunc(func([]byte) (int, error) {
		close(g.held)
		<-ctx.Done()
		return 0, context.Cause(ctx)
	})), r}, nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestSharedFetchLeaderCancel is audit row 11: the followers of a caller that gives up get the
// blob, and what it has fetched is not fetched again.
func TestSharedFetchLeaderCancel(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 2<<20)
	held := x.gate(1 << 20)
	ctx, cancel := context.WithCancelCause(t.Context())

	var group errgroup.Group
	leader := x.dst()
	group.Go(func() error {
		if err := x.Link(ctx, d, false, leader); !errors.Is(err, errStop) {
			return fmt.Errorf("Link of the leader: error %w, want errStop", err)
		}
		return nil
	})
	<-held
	var followers []string
	waiting := t.Context()
	for range 10 {
		dst := x.dst()
		followers = append(followers, dst)
		group.Go(func() error { return x.Link(waiting, d, len(dst)%2 == 0, dst) })
	}
	until(t, "ten followers", func() bool { return x.Callers() == 11 })
	cancel(errStop)
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	for _, dst := range followers {
		got, err := os.ReadFile(dst)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("a follower's file: error %v", err)
		}
	}
	if want := []int64{0, 1 << 20}; !slices.Equal(x.from, want) {
		t.Errorf("fetches from the offsets %d, want %d: the leader's and one that goes on from there", x.from, want)
	}
	x.wantSound(t)
}

// TestSharedFetchLastWaiterCancels: with the last caller the fetch ends and leaves nothing.
func TestSharedFetchLastWaiterCancels(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 2<<20)
	held := x.gate(1 << 20)
	ctx, cancel := context.WithCancelCause(t.Context())
	var group errgroup.Group
	for range 5 {
		dst := x.dst()
		group.Go(func() error {
			if err := x.Link(ctx, d, false, dst); !errors.Is(err, errStop) {
				return fmt.Errorf("error %w, want errStop", err)
			}
			return nil
		})
	}
	<-held
	until(t, "five callers", func() bool { return x.Callers() == 5 })
	cancel(errStop)
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	x.wantSound(t)
	x.link(t, d, false, data)
}

// TestOneFetchForAll: a thousand callers, one Open of the source.
func TestOneFetchForAll(t *testing.T) {
	x := start(t, 64<<20)
	d, _ := x.blob(t, 300<<10)
	var group errgroup.Group
	for i := range 1000 {
		dst := x.dst()
		group.Go(func() error { return x.Link(t.Context(), d, i%2 == 0, dst) })
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	if n := x.opens.Load(); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
	x.wantSound(t)
}

// TestBadSource: nothing that a store does wrong becomes a file.
func TestBadSource(t *testing.T) {
	broken := errors.New("the source failed")
	for name, test := range map[string]struct {
		fault castest.Fault
		want  error
	}{
		"fails":             {castest.Fault{After: -1, Err: broken}, broken},
		"fails midway":      {castest.Fault{After: 5000, Err: broken}, broken},
		"truncates":         {castest.Fault{After: 5000, Truncate: true}, cas.ErrMismatch},
		"truncates at once": {castest.Fault{Truncate: true}, cas.ErrMismatch},
		"lies":              {castest.Fault{After: 5000, Lie: true}, cas.ErrMismatch},
		"stalls":            {castest.Fault{After: 5000, Stall: true}, errStop},
	} {
		t.Run(name, func(t *testing.T) {
			x := start(t, 64<<20)
			d, data := x.blob(t, 10000)
			bad := atomic.Bool{}
			bad.Store(true)
			x.source.Plan = func(castest.Op, digest.Digest) castest.Fault {
				if bad.Load() {
					return test.fault
				}
				return castest.Fault{}
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errStop)
			defer cancel()
			dst := x.dst()
			if err := x.Link(ctx, d, false, dst); !errors.Is(err, test.want) {
				t.Errorf("Link: error %v, want %v", err, test.want)
			}
			if _, err := os.Lstat(dst); err == nil {
				t.Error("there is a file")
			}
			x.wantSound(t)
			bad.Store(false)
			x.link(t, d, false, data)
		})
	}
}

// TestEvictionStorm links, copies, opens and adopts far more than fits, from eight goroutines.
func TestEvictionStorm(t *testing.T) {
	const limit = 4 << 20
	x := start(t, limit)
	type blob struct {
		d    digest.Digest
		data []byte
	}
	blobs := make([]blob, 300)
	for i := range blobs {
		blobs[i].d, blobs[i].data = x.blob(t, 1+i*177)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	var background errgroup.Group
	background.Go(func() error { return x.Run(ctx) })

	end := time.Now().Add(2 * time.Second)
	var peak atomic.Int64
	var group errgroup.Group
	for worker := range 8 {
		random := rand.New(rand.NewPCG(uint64(worker), 1))
		group.Go(func() error {
			for n := 0; time.Now().Before(end); n++ {
				b := blobs[min(random.IntN(len(blobs)), random.IntN(len(blobs)))]
				dst := filepath.Join(x.out, fmt.Sprint(worker, "-", n))
				var err error
				switch random.IntN(4) {
				case 0:
					err = x.Copy(t.Context(), b.d, false, dst)
				case 1:
					err = adopt(t.Context(), x, b.d, b.data, dst)
				default:
					err = x.Link(t.Context(), b.d, random.IntN(2) == 0, dst)
				}
				if err != nil {
					return err
				}
				got, err := os.ReadFile(dst)
				if err != nil || !bytes.Equal(got, b.data) {
					return fmt.Errorf("%d bytes of %d, error %w", len(got), len(b.data), err)
				}
				if err := os.Remove(dst); err != nil {
					return err
				}
				if got, err = cas.ReadAll(t.Context(), x, b.d, 1<<20); err != nil || !bytes.Equal(got, b.data) {
					return fmt.Errorf("reading: %w", err)
				}
				used := x.Used()
				peak.Store(max(peak.Load(), used))
			}
			return nil
		})
	}
	err := group.Wait()
	stop(errStop)
	if err := errors.Join(err, background.Wait()); err != nil {
		t.Error(err)
	}
	if peak := peak.Load(); peak > limit+limit/20+1<<20 {
		t.Errorf("%d bytes were held, %d are allowed", peak, limit)
	}
	x.wantSound(t)
	x.reopen(t, limit)
	x.wantSound(t)
}

func adopt(ctx context.Context, x *fixture, d digest.Digest, data []byte, path string) error {
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(x.Adopt(ctx, d, false, f), f.Close())
}

// TestEvictsTheOldest: what is used stays.
func TestEvictsTheOldest(t *testing.T) {
	x := start(t, 1<<20)
	hot, hotData := x.blob(t, 4000)
	for range 1000 {
		x.link(t, hot, false, hotData)
		d, data := x.blob(t, 8000)
		x.link(t, d, false, data)
	}
	if n := x.opens.Load(); n != 1001 {
		t.Errorf("%d fetches, want 1001: each blob once", n)
	}
	if used := x.Used(); used > 1<<20+1<<20/20 {
		t.Errorf("%d bytes are held", used)
	}
	x.wantSound(t)
}

// TestRunKeepsTheMark: the background brings the tier below its bound without a caller's help.
func TestRunKeepsTheMark(t *testing.T) {
	x := start(t, 1<<20)
	for range 130 { // 1.04 MiB: above the mark, below the point where callers evict
		d, data := x.blob(t, 8000)
		x.link(t, d, false, data)
	}
	if x.Used() <= 1<<20 {
		t.Fatalf("%d bytes are held, the test expects more than 1 MiB", x.Used())
	}
	ctx, stop := context.WithCancelCause(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := x.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	until(t, "an eviction", func() bool { return x.Used() <= 1<<20-1<<20/20 })
	stop(errStop)
	group.Wait()
	x.wantSound(t)
}
