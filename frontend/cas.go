package frontend

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/semaphore"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// content serves ContentAddressableStorage; the blobs of batches are in batch.go, GetTree is in tree.go.
type content struct {
	repb.UnimplementedContentAddressableStorageServer
	blobs    cas.Store
	limits   Limits
	metrics  *metrics
	unpacked *semaphore.Weighted // bytes that all calls together have decompressed
	chunks   *chunker            // nil without the calls about chunks
}

func newContent(blobs cas.Store, limits Limits, metrics *metrics) *content {
	return &content{
		blobs: blobs, limits: limits, metrics: metrics,
		unpacked: semaphore.NewWeighted(unpackCalls * unpackFactor * limits.MaxBatchBytes),
	}
}

// spaceOf returns the space that a request's digests live in. When the request names no digest
// function, the first digest's hash decides (rows GEN-12 to GEN-16).
func spaceOf(instance string, fn repb.DigestFunction_Value, first *repb.Digest) (digest.Space, error) {
	return digest.SpaceOf(instance, fn, first.GetHash())
}

// count refuses a request with too many digests (row X-67).
func (l Limits) count(n int) error {
	if n > l.MaxDigests {
		return fmt.Errorf("%w: the request has %d digests, at most %d are allowed", errInvalid, n, l.MaxDigests)
	}
	return nil
}

// FindMissingBlobs answers which digests are absent, each once, in the order of the request.
func (c *content) FindMissingBlobs(ctx context.Context, req *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	asked := req.GetBlobDigests()
	if err := c.limits.count(len(asked)); err != nil {
		return nil, err
	}
	var first *repb.Digest
	if len(asked) > 0 {
		first = asked[0]
	}
	space, err := spaceOf(req.GetInstanceName(), req.GetDigestFunction(), first)
	if err != nil {
		return nil, err
	}
	if room := c.limits.room(space.Function()); len(asked) > room {
		return nil, fmt.Errorf("%w: the request has %d digests, at most %d of %v are allowed", errInvalid, len(asked), room, space.Function())
	}
	ds := make([]digest.Digest, len(asked))
	for i, d := range asked {
		if ds[i], err = space.Parse(d); err != nil {
			return nil, fmt.Errorf("blob_digests[%d]: %w", i, err)
		}
	}
	missing, err := c.blobs.Missing(ctx, ds)
	if err != nil {
		return nil, err
	}
	answer := make([]repb.Digest, len(missing))
	response := &repb.FindMissingBlobsResponse{MissingBlobDigests: make([]*repb.Digest, len(missing))}
	for i, d := range missing {
		answer[i].Hash, answer[i].SizeBytes = d.Hash(), d.Size()
		response.MissingBlobDigests[i] = &answer[i]
	}
	return response, nil
}

// BatchUpdateBlobs stores blobs, each with its own status. Bytes are verified even when the blob is
// already there (row BUB-10), and a blob that comes twice is stored once (row BUB-11).
func (c *content) BatchUpdateBlobs(ctx context.Context, req *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	asked := req.GetRequests()
	if err := c.limits.count(len(asked)); err != nil {
		return nil, err
	}
	var total int64
	for _, r := range asked {
		total += int64(len(r.GetData()))
	}
	if total > c.limits.MaxBatchBytes {
		return nil, fmt.Errorf("%w: the blobs have %d bytes together, at most %d are allowed", errInvalid, total, c.limits.MaxBatchBytes)
	}
	var first *repb.Digest
	if len(asked) > 0 {
		first = asked[0].GetDigest()
	}
	space, err := spaceOfBatch(req.GetInstanceName(), req.GetDigestFunction(), first)
	if err != nil {
		return nil, err
	}
	room, err := answerRoom(c.limits, asked, (*repb.BatchUpdateBlobsRequest_Request).GetDigest)
	if err != nil {
		return nil, err
	}
	errs, err := c.store(ctx, space, asked)
	if err != nil {
		return nil, err
	}
	c.metrics.received.WithLabelValues("batch").Add(float64(total))
	response := &repb.BatchUpdateBlobsResponse{Responses: make([]*repb.BatchUpdateBlobsResponse_Response, len(asked))}
	for i, r := range asked {
		response.Responses[i] = &repb.BatchUpdateBlobsResponse_Response{
			Digest: clipDigest(r.GetDigest()),
			Status: entryStatus(errs[i], &room),
		}
	}
	return response, nil
}

// BatchReadBlobs returns blobs in the order of the request, one answer for each digest in it. What
// would make the answer larger than clients accept is RESOURCE_EXHAUSTED blob by blob from the tail
// (row BRB-11).
func (c *content) BatchReadBlobs(ctx context.Context, req *repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
	asked := req.GetDigests()
	if err := c.limits.count(len(asked)); err != nil {
		return nil, err
	}
	var total int64
	for _, d := range asked {
		if n := d.GetSizeBytes(); n > 0 {
			total += min(n, math.MaxInt64-total)
		}
	}
	if total > c.limits.MaxBatchBytes {
		return nil, fmt.Errorf("%w: the blobs have %d bytes together, at most %d are allowed", errInvalid, total, c.limits.MaxBatchBytes)
	}
	var first *repb.Digest
	if len(asked) > 0 {
		first = asked[0]
	}
	space, err := spaceOfBatch(req.GetInstanceName(), req.GetDigestFunction(), first)
	if err != nil {
		return nil, err
	}
	room, err := answerRoom(c.limits, asked, func(d *repb.Digest) *repb.Digest { return d })
	if err != nil {
		return nil, err
	}
	reads, err := c.fetch(ctx, space, asked, slices.Contains(req.GetAcceptableCompressors(), repb.Compressor_ZSTD))
	if err != nil {
		return nil, err
	}
	response := &repb.BatchReadBlobsResponse{Responses: make([]*repb.BatchReadBlobsResponse_Response, len(asked))}
	sent := 0
	for i, d := range asked {
		read := reads[i]
		response.Responses[i] = &repb.BatchReadBlobsResponse_Response{Digest: clipDigest(d), Status: &statuspb.Status{}}
		switch {
		case read.err != nil:
			response.Responses[i].Status = entryStatus(read.err, &room)
		case len(read.data)+dataOverhead > room && len(read.data) > 0:
			response.Responses[i].Status = &statuspb.Status{Code: int32(codes.ResourceExhausted)}
		default:
			response.Responses[i].Data, response.Responses[i].Compressor = read.data, read.compressor
			room -= len(read.data) + dataOverhead
			sent += len(read.data)
		}
	}
	c.metrics.sent.WithLabelValues("batch").Add(float64(sent))
	return response, nil
}

// dataOverhead is what the data field and the longer lengths around it add to an entry.
const dataOverhead = 1 + 4 + 3

// readBlob reads a whole blob of at most limit bytes; a damaged one is errDamaged.
func readBlob(ctx context.Context, blobs cas.Store, d digest.Digest, limit int64) ([]byte, error) {
	b, err := cas.ReadAll(ctx, blobs, d, limit)
	if err != nil {
		return nil, onRead(err)
	}
	return b, nil
}

// onRead tells damage that a read met, which is the store's fault, from what a writer brought.
func onRead(err error) error {
	if errors.Is(err, cas.ErrMismatch) || errors.Is(err, compress.ErrInvalid) || errors.Is(err, compress.ErrTooLarge) {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}

// answerRoom is what a batch answer has left for data and texts when every digest is in it as the
// client sent it, which need not be with a hash of the right length.
func answerRoom[T any](l Limits, asked []T, digestOf func(T) *repb.Digest) (int, error) {
	room := l.MaxResponseBytes
	for _, entry := range asked {
		room -= entryBytes(len(clipDigest(digestOf(entry)).GetHash()))
	}
	if room < 0 {
		return 0, fmt.Errorf("%w: the answer for %d digests would be larger than %d bytes", errInvalid, len(asked), l.MaxResponseBytes)
	}
	return room, nil
}

// clipDigest is a digest as the client sent it, unless its hash is so long that echoing it would
// make the answer large. It is never nil.
func clipDigest(d *repb.Digest) *repb.Digest {
	const longest = digest.MaxHexLen
	if d == nil {
		return &repb.Digest{}
	}
	if len(d.GetHash()) > longest {
		return &repb.Digest{Hash: d.GetHash()[:longest], SizeBytes: d.GetSizeBytes()}
	}
	return d
}

// entryStatus is the status of one blob of a batch, never nil (row BUB-2). Its text and details are
// left out when room, the bytes left of the answer, is used up.
func entryStatus(err error, room *int) *statuspb.Status {
	if err == nil {
		return &statuspb.Status{}
	}
	full := statusOf(err, 1).Proto()
	cost := len(full.GetMessage())
	for _, detail := range full.GetDetails() {
		cost += len(detail.GetTypeUrl()) + len(detail.GetValue())
	}
	const framing = 32
	if cost+framing > *room {
		return &statuspb.Status{Code: full.GetCode()}
	}
	*room -= cost + framing
	return full
}
