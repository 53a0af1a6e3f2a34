package upstream

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Tier is the farm's own store with an upstream behind it. New makes one, Run must go on while it is
// used. See the package comment for what it promises.
type Tier struct {
	local  cas.Store
	client *Client
	log    *slog.Logger

	patience time.Duration
	fetching chan struct{} // a token for each fetch
	started  chan struct{} // closed when Run has begun
	small    *queue        // of blobs to be copied
	large    *queue

	mu       sync.Mutex      // guards the rest
	launch   func(f *flight) // starts a flight; nil before and after Run
	flights  map[digest.Digest]*flight
	promised map[digest.Digest]int // blobs on their way, by how many results need them
}

var (
	_ cas.Store       = (*Tier)(nil)
	_ cas.Confirmer   = (*Tier)(nil)
	_ cas.Resumer     = (*Tier)(nil)
	_ cas.Peeker      = (*Tier)(nil)
	_ cas.BatchPutter = (*Tier)(nil)
	_ cas.BatchReader = (*Tier)(nil)
	_ cas.Sizer       = (*Tier)(nil)
	_ cas.FrameOpener = (*Tier)(nil)
)

// fetches is how many blobs are fetched at once.
const fetches = 32

// New returns a tier on a store. It starts nothing.
func New(local cas.Store, client *Client) *Tier {
	t := &Tier{
		local: local, client: client, log: client.cfg.Log, patience: patience,
		fetching: make(chan struct{}, fetches), started: make(chan struct{}),
		flights: make(map[digest.Digest]*flight), promised: make(map[digest.Digest]int),
	}
	t.small = newQueue("blob", client)
	t.large = newQueue("blob", client)
	queued(client.cfg.Registerer, "blob", func() int { return t.small.length() + t.large.length() })
	return t
}

// Run fetches, copies and watches the upstream's health until ctx ends. What waits to be copied then
// is copied within the bound on draining.
func (t *Tier) Run(ctx context.Context) error {
	var group errgroup.Group
	t.mu.Lock()
	t.launch = func(f *flight) {
		own, cancel := context.WithCancelCause(ctx)
		f.cancel = cancel
		group.Go(func() error {
			defer cancel(nil)
			t.fly(own, f)
			return nil
		})
	}
	close(t.started)
	t.mu.Unlock()
	group.Go(func() error { return t.client.Run(ctx) })
	group.Go(func() error {
		return drained(ctx, t.client.cfg.Drain, func(ctx context.Context, closing <-chan struct{}) {
			t.copyQueued(ctx, closing)
		})
	})
	<-ctx.Done()
	t.mu.Lock()
	t.launch = nil
	t.mu.Unlock()
	return group.Wait()
}

// Open implements cas.Store. What is absent here is fetched from the upstream and stored.
func (t *Tier) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := t.local.Open(ctx, d, offset)
	if err == nil || !errors.Is(err, cas.ErrNotFound) || d.IsImpossible() {
		return r, err
	}
	return fetching{t, err}.Open(ctx, d, offset)
}

// verdict returns the error of a read whose blob is absent here and whose fetch ended with failed.
func (t *Tier) verdict(ctx context.Context, absent, failed error) error {
	switch {
	case failed == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(failed, cas.ErrNotFound), errors.Is(failed, ErrDown), errors.Is(failed, ErrRefused):
		return absent
	case errors.Is(failed, cas.ErrMismatch):
		// A damaged copy of the upstream is as good as none.
		t.log.WarnContext(ctx, "upstream cache has a damaged blob", "err", failed)
		return absent
	}
	return failed
}

// Put implements cas.Store: the blob is stored here when it returns, and copied to the upstream later.
func (t *Tier) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	err := t.local.Put(ctx, d, r)
	if err == nil {
		t.offer(d)
	}
	return err
}

// Missing implements cas.Store. The upstream is not asked: what is present is durable here. A blob
// that a result of the upstream has promised is waited for.
func (t *Tier) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	missing, err := t.local.Missing(ctx, ds)
	if err != nil {
		return nil, err
	}
	return t.arriving(ctx, missing)
}

// Confirm implements cas.Confirmer.
func (t *Tier) Confirm(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	missing, err := cas.Confirm(ctx, t.local, ds)
	if err != nil {
		return nil, err
	}
	return t.arriving(ctx, missing)
}
