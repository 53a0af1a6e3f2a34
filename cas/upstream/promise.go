package upstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

const (
	// arrival is how long a question waits for promised blobs, of which it fetches a few at once.
	arrival  = 20 * time.Second
	arrivals = 16
)

var errLate = fmt.Errorf("%w: promised blobs are late", cas.ErrUnavailable)

// arriving fetches those of the missing blobs that were promised and returns what is missing then.
func (t *Tier) arriving(ctx context.Context, missing []digest.Digest) ([]digest.Digest, error) {
	var wanted []int
	t.mu.Lock()
	if len(t.promised) > 0 {
		for i, d := range missing {
			if t.promised[d] > 0 {
				wanted = append(wanted, i)
			}
		}
	}
	t.mu.Unlock()
	if len(wanted) == 0 {
		return missing, nil
	}
	bound, cancel := context.WithTimeoutCause(ctx, arrival, errLate)
	defer cancel()
	var group errgroup.Group
	group.SetLimit(arrivals)
	arrived := make([]bool, len(missing))
	for _, i := range wanted {
		group.Go(func() error {
			arrived[i] = t.ensure(bound, missing[i]) == nil
			return nil
		})
	}
	if err := group.Wait(); err != nil || ctx.Err() != nil {
		return nil, errors.Join(err, context.Cause(ctx))
	}
	still := missing[:0]
	for i, d := range missing {
		if !arrived[i] {
			still = append(still, d)
		}
	}
	return still, nil
}

// ensure fetches a blob that is absent here.
func (t *Tier) ensure(ctx context.Context, d digest.Digest) error {
	f, err := t.join(ctx, d)
	if err != nil {
		return err
	}
	defer t.leave(f)
	select {
	case <-f.landed:
		return f.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// promise notes blobs that are on their way, unless there are too many.
func (t *Tier) promise(ds []digest.Digest) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.promised)+len(ds) > maxPromised {
		return false
	}
	for _, d := range ds {
		t.promised[d]++
	}
	return true
}

// kept ends the promise of a blob.
func (t *Tier) kept(d digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.promised[d]--; t.promised[d] <= 0 {
		delete(t.promised, d)
	}
}
