package memory

import (
	"bytes"
	"context"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

var (
	_ cas.BatchPutter = (*Tier)(nil)
	_ cas.BatchReader = (*Tier)(nil)
)

// batchWidth is how many blobs of a batch a source that takes no batches is given at a time.
const batchWidth = 32

// PutBatch implements cas.BatchPutter. What is held is a copy: the caller's bytes may be part of one
// large message.
func (t *Tier) PutBatch(ctx context.Context, ds []digest.Digest, data [][]byte) []error {
	errs := cas.PutBatch(ctx, t.source, batchWidth, ds, data)
	var stored []digest.Digest
	var copies [][]byte
	for i, d := range ds {
		if errs[i] == nil && takes(d) && int64(len(data[i])) == d.Size() {
			held := bytes.Clone(data[i])
			t.hold(d, held, false) // a source that has the blob does not check it
			stored, copies = append(stored, d), append(copies, held)
		}
	}
	t.packUp(stored, copies)
	return errs
}

// ReadBatch implements cas.BatchReader.
func (t *Tier) ReadBatch(ctx context.Context, ds []digest.Digest) (data [][]byte, errs []error) {
	data, errs = make([][]byte, len(ds)), make([]error, len(ds))
	var absent []digest.Digest
	var at []int
	for i, d := range ds {
		if held, ok := t.Peek(d); ok {
			data[i] = held
			continue
		}
		if takes(d) {
			t.metrics.misses.Inc()
			var ok bool
			if data[i], ok = t.unpack(d); ok {
				continue
			}
		}
		absent, at = append(absent, d), append(at, i)
	}
	if len(absent) == 0 {
		return data, errs
	}
	read, failed := cas.ReadBatch(ctx, t.source, batchWidth, absent)
	var kept []digest.Digest
	var copies [][]byte
	for i, d := range absent {
		data[at[i]], errs[at[i]] = read[i], failed[i]
		if failed[i] == nil && takes(d) {
			t.hold(d, read[i], true)
			kept, copies = append(kept, d), append(copies, read[i])
		}
	}
	t.packUp(kept, copies)
	return data, errs
}
