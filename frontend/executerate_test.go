package frontend_test

import (
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/frontend"
)

// TestExecuteRate: more calls than the frontend takes are told to come again.
func TestExecuteRate(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.ExecuteRate = 1 })
	action := h.action(t).Proto()
	for range 20 {
		_, err := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action}).Recv()
		if err == nil {
			continue
		}
		wantCode(t, "one too many", err, codes.ResourceExhausted, "takes 1")
		if details := status.Convert(err).Details(); len(details) != 1 {
			t.Errorf("details %v, want a RetryInfo", details)
		}
		return
	}
	t.Error("20 calls within a moment were taken, want 1 per second")
}
