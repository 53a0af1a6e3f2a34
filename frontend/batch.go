package frontend

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// spaceOfBatch is spaceOf for a batch, in which a malformed digest fails alone: when the first is one,
// the others have the default function (decision D1).
func spaceOfBatch(instance string, fn repb.DigestFunction_Value, first *repb.Digest) (digest.Space, error) {
	if space, err := spaceOf(instance, fn, first); err == nil {
		return space, nil
	}
	return digest.SpaceOf(instance, fn, "")
}

// What compressed blobs of batches may decompress to: unpackFactor times the batch limit in one call,
// of which unpackCalls are in memory at once (row BUB-8).
const (
	unpackFactor = 16
	unpackCalls  = 4
)

// store puts the blobs of a batch and returns one error for each; its own error ends the whole call.
func (c *content) store(ctx context.Context, space digest.Space, asked []*repb.BatchUpdateBlobsRequest_Request) ([]error, error) {
	budget := unpackFactor * c.limits.MaxBatchBytes
	if size := unpackedSize(asked, budget); size > 0 {
		if err := c.unpacked.Acquire(ctx, size); err != nil {
			return nil, context.Cause(ctx)
		}
		defer c.unpacked.Release(size)
	}
	errs := make([]error, len(asked))
	firstOf := make(map[digest.Digest]int, len(asked))
	sameAs := make([]int, len(asked))
	var ds []digest.Digest
	var data [][]byte
	var at []int // where in asked each of ds is
	for i, r := range asked {
		sameAs[i] = i
		d, b, err := c.verified(space, r, &budget)
		if err != nil {
			errs[i] = err
			continue
		}
		if j, twice := firstOf[d]; twice {
			sameAs[i] = j
			continue
		}
		firstOf[d] = i
		ds, data, at = append(ds, d), append(data, b), append(at, i)
	}
	for i, err := range cas.PutBatch(ctx, c.blobs, c.limits.BatchConcurrency, ds, data) {
		errs[at[i]] = err
	}
	for i, j := range sameAs {
		errs[i] = errs[j]
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return errs, nil
}

// unpackedSize is how many bytes the compressed blobs of a batch will take, at most most.
func unpackedSize(asked []*repb.BatchUpdateBlobsRequest_Request, most int64) int64 {
	var total int64
	for _, r := range asked {
		if r.GetCompressor() == repb.Compressor_ZSTD {
			total += min(max(r.GetDigest().GetSizeBytes(), 0), most-total)
		}
	}
	return total
}

// verified returns the digest and the bytes of one blob of a batch after checking that they belong
// together. What it decompresses is taken from budget.
func (c *content) verified(space digest.Space, r *repb.BatchUpdateBlobsRequest_Request, budget *int64) (digest.Digest, []byte, error) {
	d, err := space.Parse(r.GetDigest())
	if err != nil {
		return digest.Digest{}, nil, err
	}
	if d.Size() > c.limits.MaxBlobBytes {
		return digest.Digest{}, nil, fmt.Errorf("%w: blob %v is larger than %d bytes, the most that is stored", errInvalid, d, c.limits.MaxBlobBytes)
	}
	data := r.GetData()
	switch r.GetCompressor() {
	case repb.Compressor_IDENTITY:
	case repb.Compressor_ZSTD:
		if d.Size() > *budget {
			return digest.Digest{}, nil, fmt.Errorf("%w: blob %v would take the batch above %d bytes when decompressed",
				errInvalid, d, unpackFactor*c.limits.MaxBatchBytes)
		}
		*budget -= d.Size()
		if data, err = compress.Decode(nil, data, d.Size()); err != nil {
			return digest.Digest{}, nil, fmt.Errorf("blob %v: %w", d, err)
		}
	default:
		return digest.Digest{}, nil, fmt.Errorf("%w: blob %v: compressor %v is not supported (supported: IDENTITY, ZSTD)", errInvalid, d, r.GetCompressor())
	}
	if got := space.Of(data); got != d {
		return digest.Digest{}, nil, fmt.Errorf("%w: blob %v has data with the digest %s/%d", cas.ErrMismatch, d, got.Hash(), got.Size())
	}
	return d, data, nil
}

// blobRead is the outcome of reading one blob of a batch.
type blobRead struct {
	data       []byte
	compressor repb.Compressor_Value
	err        error
}

// pack compresses the blob if that makes it smaller.
func (r *blobRead) pack() {
	const worth = 128 // bytes; below, a frame saves less than it costs
	if r.err != nil || len(r.data) < worth {
		return
	}
	if packed := compress.Append(nil, r.data); len(packed) < len(r.data) {
		r.data, r.compressor = packed, repb.Compressor_ZSTD
	}
}

// fetch reads the blobs of a batch, each distinct one once, and compresses them if asked to.
func (c *content) fetch(ctx context.Context, space digest.Space, asked []*repb.Digest, compressed bool) ([]*blobRead, error) {
	reads := make([]*blobRead, len(asked))
	known := make(map[digest.Digest]*blobRead, len(asked))
	var ds []digest.Digest
	for i, message := range asked {
		d, err := space.Parse(message)
		if err != nil {
			reads[i] = &blobRead{err: err}
			continue
		}
		if known[d] == nil {
			known[d] = &blobRead{}
			if data, ok := cas.Peek(c.blobs, d); ok {
				known[d].data = data
			} else {
				ds = append(ds, d)
			}
		}
		reads[i] = known[d]
	}
	data, errs := cas.ReadBatch(ctx, c.blobs, c.limits.BatchConcurrency, ds)
	for i, d := range ds {
		known[d].data, known[d].err = data[i], onRead(errs[i])
	}
	if compressed {
		for _, read := range known {
			read.pack()
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return reads, nil
}
