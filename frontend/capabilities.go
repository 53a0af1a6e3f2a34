package frontend

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/bazelbuild/remote-apis/build/bazel/semver"

	"github.com/jetfarm/jetfarm/cas/chunking"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// capabilities answers GetCapabilities from the configuration alone: it touches no storage, so it
// answers while everything else is down (row CAP-20).
type capabilities struct {
	repb.UnimplementedCapabilitiesServer
	limits  Limits
	updates bool
	execute bool
	chunks  *chunking.Params // nil without the calls about chunks
}

// GetCapabilities describes the instance of the request, which is the same for every instance.
func (c *capabilities) GetCapabilities(_ context.Context, req *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	if _, err := digest.SpaceOf(req.GetInstanceName(), digest.SHA256.Proto(), ""); err != nil {
		return nil, err
	}
	functions := make([]repb.DigestFunction_Value, 0, len(digest.Functions()))
	for _, f := range digest.Functions() {
		functions = append(functions, f.Proto())
	}
	priorities := &repb.PriorityCapabilities{Priorities: []*repb.PriorityCapabilities_PriorityRange{
		{MinPriority: minPriority, MaxPriority: maxPriority},
	}}
	answer := &repb.ServerCapabilities{
		CacheCapabilities: &repb.CacheCapabilities{
			DigestFunctions:               functions,
			ActionCacheUpdateCapabilities: &repb.ActionCacheUpdateCapabilities{UpdateEnabled: c.updates},
			CachePriorityCapabilities:     priorities,
			MaxBatchTotalSizeBytes:        c.limits.MaxBatchBytes,
			MaxCasBlobSizeBytes:           c.limits.MaxBlobBytes,
			SymlinkAbsolutePathStrategy:   repb.SymlinkAbsolutePathStrategy_ALLOWED,
			// IDENTITY goes without saying; a client that takes the first of the list must not get it.
			SupportedCompressors:            []repb.Compressor_Value{repb.Compressor_ZSTD},
			SupportedBatchUpdateCompressors: []repb.Compressor_Value{repb.Compressor_ZSTD},
		},
		ExecutionCapabilities: &repb.ExecutionCapabilities{
			DigestFunction:                functions[0],
			DigestFunctions:               functions,
			ExecEnabled:                   c.execute,
			ExecutionPriorityCapabilities: priorities,
		},
		// Bazel 4 and older refuse a server whose low version is above 2.0. 2.12 and 2.13 add the calls
		// about chunks, which a client asks for only if the flags below are set (rows CAP-17, CHK-2).
		DeprecatedApiVersion: &semver.SemVer{Major: 2},
		LowApiVersion:        &semver.SemVer{Major: 2},
		HighApiVersion:       &semver.SemVer{Major: 2, Minor: 13},
	}
	if c.chunks != nil {
		cache := answer.GetCacheCapabilities()
		cache.SplitBlobSupport, cache.SpliceBlobSupport = true, true
		cache.FastCdc_2020Params = &repb.FastCdc2020Params{
			AvgChunkSizeBytes: uint64(c.chunks.Average), //nolint:gosec // positive
			Seed:              c.chunks.Seed,
		}
	}
	return answer, nil
}
