package upstream

import (
	"context"
	"errors"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Committed implements cas.Resumer.
func (t *Tier) Committed(ctx context.Context, d digest.Digest, upload string) (int64, error) {
	return cas.Committed(ctx, t.local, d, upload)
}

// PutFrom implements cas.Resumer.
func (t *Tier) PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	err := cas.PutFrom(ctx, t.local, d, upload, offset, r)
	if err == nil {
		t.offer(d)
	}
	return err
}

// PutBatch implements cas.BatchPutter.
func (t *Tier) PutBatch(ctx context.Context, ds []digest.Digest, data [][]byte) []error {
	errs := cas.PutBatch(ctx, t.local, arrivals, ds, data)
	for i, d := range ds {
		if errs[i] == nil {
			t.offer(d)
		}
	}
	return errs
}

// ReadBatch implements cas.BatchReader.
func (t *Tier) ReadBatch(ctx context.Context, ds []digest.Digest) ([][]byte, []error) {
	data, errs := cas.ReadBatch(ctx, t.local, arrivals, ds)
	var group errgroup.Group
	group.SetLimit(arrivals)
	for i, err := range errs {
		if !errors.Is(err, cas.ErrNotFound) || ds[i].IsImpossible() {
			continue
		}
		group.Go(func() error {
			data[i], errs[i] = cas.ReadAll(ctx, fetching{t, err}, ds[i], ds[i].Size())
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, errs
	}
	return data, errs
}

// fetching is the tier for a blob that is absent in its own store.
type fetching struct {
	tier   *Tier
	absent error
}

// Open implements cas.Store.
func (f fetching) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := f.tier.fetch(ctx, d, offset)
	return r, f.tier.verdict(ctx, f.absent, err)
}

// Put implements cas.Store.
func (f fetching) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return f.tier.Put(ctx, d, r)
}

// Missing implements cas.Store.
func (f fetching) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return f.tier.Missing(ctx, ds)
}

// OpenFrames implements cas.FrameOpener.
func (t *Tier) OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := cas.OpenFrames(ctx, t.local, d, offset)
	if err == nil || !errors.Is(err, cas.ErrNotFound) || d.IsImpossible() {
		return r, err
	}
	return cas.OpenFrames(ctx, fetching{t, err}, d, offset)
}

// Peek implements cas.Peeker.
func (t *Tier) Peek(d digest.Digest) ([]byte, bool) { return cas.Peek(t.local, d) }

// Size implements cas.Sizer: the upstream finds no blob by its hash alone.
func (t *Tier) Size(ctx context.Context, space digest.Space, hash string) (int64, error) {
	d, err := cas.Find(ctx, t.local, space, hash)
	return d.Size(), err
}
