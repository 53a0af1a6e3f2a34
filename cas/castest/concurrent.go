package castest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// testEqualPuts is audit row 18: writers of one blob do not wait for each other, a corrupt one
// harms nobody, and readers see the whole blob or none.
func testEqualPuts(t *testing.T, s cas.Store) {
	for _, size := range []int{1, 4 << 10, 512 << 10, 3 * 512 << 10} {
		d, data := Blob(Space(t, ""), size)
		ctx, cancel := context.WithCancelCause(t.Context())
		stalled := readerFunc(func([]byte) (int, error) {
			<-ctx.Done()
			return 0, context.Cause(ctx)
		})
		wrong := bytes.Clone(data)
		wrong[size/2] ^= 1

		var late sync.WaitGroup
		late.Go(func() {
			err := s.Put(ctx, d, io.MultiReader(bytes.NewReader(data[:size/2]), stalled))
			if err != nil && !errors.Is(err, errStop) {
				t.Errorf("Put of the stalled writer: %v", err)
			}
		})
		var writers sync.WaitGroup
		for range 4 {
			writers.Go(func() {
				if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
					t.Errorf("Put: %v", err)
				}
				if err := whole(t.Context(), s, d, data); err != nil {
					t.Errorf("right after its Put: %v", err)
				}
			})
			writers.Go(func() {
				if err := s.Put(t.Context(), d, bytes.NewReader(wrong)); err != nil && !errors.Is(err, cas.ErrMismatch) {
					t.Errorf("Put of wrong bytes: error %v", err)
				}
			})
			writers.Go(func() {
				if err := whole(t.Context(), s, d, data); err != nil && !errors.Is(err, cas.ErrNotFound) {
					t.Errorf("during the Puts: %v", err)
				}
			})
		}
		soon(t, "Put beside a stalled writer", writers.Wait)
		cancel(errStop)
		soon(t, "the stalled writer", late.Wait)
		wantBlob(t, s, d, data)
	}
}

// whole reads the blob and compares it.
func whole(ctx context.Context, s cas.Store, d digest.Digest, want []byte) error {
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%v has %d wrong bytes", d, len(got))
	}
	return nil
}

// testMixedUse has clients do everything at once for a moment, and give up now and then.
func testMixedUse(t *testing.T, s cas.Store) {
	type blob struct {
		d    digest.Digest
		data []byte
	}
	var blobs []blob
	var ds []digest.Digest
	for i := range 24 {
		d, data := Blob(Space(t, ""), 1+i*i*2000)
		blobs = append(blobs, blob{d, data})
		ds = append(ds, d)
	}
	end := time.Now().Add(time.Second)
	step := func(random *rand.Rand) error {
		ctx, b := t.Context(), blobs[random.IntN(len(blobs))]
		if random.IntN(4) == 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, time.Duration(random.IntN(2000))*time.Microsecond, errStop)
			defer cancel()
		}
		var err error
		switch random.IntN(3) {
		case 0:
			err = s.Put(ctx, b.d, bound(ctx, bytes.NewReader(b.data)))
		case 1:
			err = whole(ctx, s, b.d, b.data)
			if errors.Is(err, cas.ErrNotFound) {
				err = nil
			}
		case 2:
			_, err = s.Missing(ctx, ds)
		}
		if errors.Is(err, errStop) {
			err = nil
		}
		return err
	}
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 0))
			for time.Now().Before(end) {
				if err := step(random); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	soon(t, "mixed use", clients.Wait)
	for _, b := range blobs {
		put(t, s, b.d, b.data)
		wantBlob(t, s, b.d, b.data)
	}
}
