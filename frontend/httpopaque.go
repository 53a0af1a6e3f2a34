package frontend

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Some clients of the HTTP cache, such as ccache, keep values of their own under /ac/, with keys that
// are the digest of nothing. Where the operator allows it, such a value is a blob, and the action cache
// has a result with that one output under a key made from the client's: so it lives and is evicted like
// any other result, and no client of the Remote Execution API meets it.

// opaqueOutput is the only output of such a result.
const opaqueOutput = "value"

// opaqueKey is the action that stands for a client's key.
func opaqueKey(name httpName) digest.Digest {
	return name.space.Of([]byte("opaque result of the HTTP cache under " + name.hash))
}

// putOpaque stores a value.
func (h *httpCache) putOpaque(ctx context.Context, name httpName, value []byte) error {
	blob, err := cas.PutBytes(ctx, h.blobs, name.space, value)
	if err != nil {
		return err
	}
	return h.actions.actions.Put(ctx, opaqueKey(name), &repb.ActionResult{
		OutputFiles: []*repb.OutputFile{{Path: opaqueOutput, Digest: blob.Proto()}},
	})
}

// getOpaque returns a value.
func (h *httpCache) getOpaque(ctx context.Context, name httpName) ([]byte, error) {
	result, err := lookup(ctx, h.actions.actions, opaqueKey(name), h.metrics)
	if err != nil {
		return nil, err
	}
	for _, file := range result.GetOutputFiles() {
		if file.GetPath() != opaqueOutput {
			continue
		}
		blob, err := name.space.Parse(file.GetDigest())
		if err != nil {
			return nil, err
		}
		return readBlob(ctx, h.blobs, blob, int64(h.limits.MaxResultBytes))
	}
	return nil, fmt.Errorf("%w: the value of %s", cas.ErrNotFound, name.hash)
}
