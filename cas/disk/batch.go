package disk

import (
	"context"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// batchWidth is how many blobs of a batch a source that takes no batches is given at a time.
const batchWidth = 32

// PutBatch implements cas.BatchPutter.
func (t *Tier) PutBatch(ctx context.Context, ds []digest.Digest, data [][]byte) []error {
	return cas.PutBatch(ctx, t.source, batchWidth, ds, data)
}

// ReadBatch implements cas.BatchReader: small blobs come from the source in a batch, since files of
// them are not faster, and the others one by one.
func (t *Tier) ReadBatch(ctx context.Context, ds []digest.Digest) (data [][]byte, errs []error) {
	data, errs = make([][]byte, len(ds)), make([]error, len(ds))
	var small []digest.Digest
	var at []int
	for i, d := range ds {
		if d.Size() <= smallest && !t.holds(d) {
			small, at = append(small, d), append(at, i)
			continue
		}
		data[i], errs[i] = cas.ReadAll(ctx, t, d, d.Size())
	}
	if len(small) == 0 {
		return data, errs
	}
	read, failed := cas.ReadBatch(ctx, t.source, batchWidth, small)
	for i, j := range at {
		data[j], errs[j] = read[i], failed[i]
	}
	return data, errs
}

// holds reports whether there is a file that a read can use at once.
func (t *Tier) holds(d digest.Digest) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fresh(d, false) || t.fresh(d, true)
}
