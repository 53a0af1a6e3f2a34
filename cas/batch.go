package cas

import (
	"bytes"
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// BatchPutter is a Store that takes many small blobs at once for less than one by one.
type BatchPutter interface {
	// PutBatch is Put of every blob, with the outcome of each.
	PutBatch(ctx context.Context, ds []digest.Digest, data [][]byte) []error
}

// BatchReader is a Store that gives many small blobs at once for less than one by one.
type BatchReader interface {
	// ReadBatch returns every blob whole, or the error of its Open or of its reader. The caller bounds
	// how much that is.
	ReadBatch(ctx context.Context, ds []digest.Digest) (data [][]byte, errs []error)
}

// PutBatch stores blobs, at most width of them at a time unless the store is a BatchPutter. Result
// i is the error of blob i.
func PutBatch(ctx context.Context, s Store, width int, ds []digest.Digest, data [][]byte) []error {
	if b, ok := s.(BatchPutter); ok {
		return b.PutBatch(ctx, ds, data)
	}
	errs := make([]error, len(ds))
	each(width, ds, func(i int, d digest.Digest) { errs[i] = s.Put(ctx, d, bytes.NewReader(data[i])) })
	return errs
}

// ReadBatch returns whole blobs, at most width of them at a time unless the store is a BatchReader.
func ReadBatch(ctx context.Context, s Store, width int, ds []digest.Digest) (data [][]byte, errs []error) {
	if b, ok := s.(BatchReader); ok {
		return b.ReadBatch(ctx, ds)
	}
	data, errs = make([][]byte, len(ds)), make([]error, len(ds))
	each(width, ds, func(i int, d digest.Digest) { data[i], errs[i] = ReadAll(ctx, s, d, d.Size()) })
	return data, errs
}

// each calls f for every digest, width at a time.
func each(width int, ds []digest.Digest, f func(i int, d digest.Digest)) {
	var g errgroup.Group
	g.SetLimit(width)
	for i, d := range ds {
		g.Go(func() error {
			f(i, d)
			return nil
		})
	}
	g.Wait() //nolint:errcheck // no function of it fails
}
