package frontend_test

import (
	"slices"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/bazelbuild/remote-apis/build/bazel/semver"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/jetfarm/jetfarm/frontend"
)

func TestCapabilities(t *testing.T) {
	h := start(t)
	got, err := h.caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{InstanceName: "projects/p/instances/i"})
	if err != nil {
		t.Fatalf("GetCapabilities: %v", err)
	}
	priorities := &repb.PriorityCapabilities{Priorities: []*repb.PriorityCapabilities_PriorityRange{{MinPriority: -1000, MaxPriority: 1000}}}
	functions := []repb.DigestFunction_Value{
		repb.DigestFunction_SHA256, repb.DigestFunction_BLAKE3, repb.DigestFunction_SHA1,
		repb.DigestFunction_SHA384, repb.DigestFunction_SHA512, repb.DigestFunction_SHA256TREE,
	}
	want := &repb.ServerCapabilities{
		CacheCapabilities: &repb.CacheCapabilities{
			DigestFunctions:                 functions,
			ActionCacheUpdateCapabilities:   &repb.ActionCacheUpdateCapabilities{},
			CachePriorityCapabilities:       priorities,
			MaxBatchTotalSizeBytes:          4063232,
			MaxCasBlobSizeBytes:             64 << 30,
			SymlinkAbsolutePathStrategy:     repb.SymlinkAbsolutePathStrategy_ALLOWED,
			SupportedCompressors:            []repb.Compressor_Value{repb.Compressor_ZSTD},
			SupportedBatchUpdateCompressors: []repb.Compressor_Value{repb.Compressor_ZSTD},
		},
		ExecutionCapabilities: &repb.ExecutionCapabilities{
			DigestFunction: repb.DigestFunction_SHA256, DigestFunctions: functions, ExecEnabled: true,
			ExecutionPriorityCapabilities: priorities,
		},
		DeprecatedApiVersion: &semver.SemVer{Major: 2},
		LowApiVersion:        &semver.SemVer{Major: 2},
		HighApiVersion:       &semver.SemVer{Major: 2, Minor: 13},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("GetCapabilities (-want +got):\n%s", diff)
	}
	cache, exec := got.GetCacheCapabilities(), got.GetExecutionCapabilities()
	low, high := got.GetLowApiVersion(), got.GetHighApiVersion()
	for row, ok := range map[string]bool{
		"CAP-1 both services are told":           cache != nil && exec != nil,
		"CAP-4 no unknown digest function":       !slices.Contains(cache.GetDigestFunctions(), 0) && !slices.Contains(exec.GetDigestFunctions(), 0) && exec.GetDigestFunction() != 0,
		"CAP-6 the single function is listed":    slices.Contains(exec.GetDigestFunctions(), exec.GetDigestFunction()),
		"CAP-7 the cache hashes what runs":       !slices.ContainsFunc(exec.GetDigestFunctions(), func(f repb.DigestFunction_Value) bool { return !slices.Contains(cache.GetDigestFunctions(), f) }),
		"CAP-8 zstd first, identity unlisted":    len(cache.GetSupportedCompressors()) == 1 && cache.GetSupportedCompressors()[0] == repb.Compressor_ZSTD,
		"CAP-10 a batch limit that clients like": cache.GetMaxBatchTotalSizeBytes() >= 4_000_000,
		"CAP-12 the symlink strategy is known":   cache.GetSymlinkAbsolutePathStrategy() != 0,
		"CAP-16 three versions in order":         got.GetDeprecatedApiVersion().GetMajor() == 2 && low.GetMajor() == 2 && low.GetMinor() == 0 && high.GetMajor() == 2,
		"CAP-19 new enough for output_paths":     high.GetMinor() >= 2,
	} {
		t.Run(row, func(t *testing.T) {
			if !ok {
				t.Errorf("GetCapabilities = %v", got)
			}
		})
	}
	for _, r := range append(cache.GetCachePriorityCapabilities().GetPriorities(), exec.GetExecutionPriorityCapabilities().GetPriorities()...) {
		t.Run("CAP-14 zero is a priority", func(t *testing.T) {
			if r.GetMinPriority() > 0 || r.GetMaxPriority() < 0 {
				t.Errorf("range %v", r)
			}
		})
	}
	t.Run("CAP-21 without anything in the request", func(t *testing.T) {
		if _, err := h.caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{}); err != nil {
			t.Errorf("GetCapabilities: %v", err)
		}
	})
}

func TestCAP_1_CAP_5_CAP_13_CacheOnly(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.AllowActionCacheUpdates, c.ExecEnabled = true, false })
	got, err := h.caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{})
	if err != nil {
		t.Fatalf("GetCapabilities: %v", err)
	}
	if !got.GetCacheCapabilities().GetActionCacheUpdateCapabilities().GetUpdateEnabled() {
		t.Error("update_enabled = false, want true")
	}
	// Rows CAP-1 and CAP-5.
	exec := got.GetExecutionCapabilities()
	if exec.GetExecEnabled() || exec.GetDigestFunction() != repb.DigestFunction_SHA256 {
		t.Errorf("execution_capabilities = %v, want it off and SHA256", exec)
	}
}

// Rows GEN-4 and X-13 on every call that has an instance name.
func TestGEN_4_X_13_InstanceNames(t *testing.T) {
	h := start(t)
	for _, instance := range []string{"x/blobs", "uploads", "a//b", "/a", "a/", "..", "a\x00b", strings.Repeat("x", 1<<20)} {
		t.Run(name(instance[:min(8, len(instance))]), func(t *testing.T) {
			d := space.Of([]byte("x")).Proto()
			_, err := h.caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{InstanceName: instance})
			wantCode(t, "GetCapabilities", err, codes.InvalidArgument, "instance name")
			_, err = h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{InstanceName: instance})
			wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument, "instance name")
			_, err = h.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{InstanceName: instance})
			wantCode(t, "BatchUpdateBlobs", err, codes.InvalidArgument, "instance name")
			_, err = h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{InstanceName: instance})
			wantCode(t, "BatchReadBlobs", err, codes.InvalidArgument, "instance name")
			_, err = h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: instance, ActionDigest: d})
			wantCode(t, "GetActionResult", err, codes.InvalidArgument, "instance name")
			tree, err := h.cas.GetTree(t.Context(), &repb.GetTreeRequest{InstanceName: instance, RootDigest: d})
			if err == nil {
				_, err = tree.Recv()
			}
			wantCode(t, "GetTree", err, codes.InvalidArgument, "instance name")
			exec, err := h.exec.Execute(t.Context(), &repb.ExecuteRequest{InstanceName: instance, ActionDigest: d})
			if err == nil {
				_, err = exec.Recv()
			}
			wantCode(t, "Execute", err, codes.InvalidArgument, "instance name")
		})
	}
}
