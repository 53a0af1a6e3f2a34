package integration_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
)

// cachedActions is how many different actions the benchmarks of the action cache ask for.
const cachedActions = 1000

// A result with four output files, as that of a compilation, from the cache or into it.
func BenchmarkActionResult(b *testing.B) {
	f := &allInOne{data: dataDir(b)}
	f.up = start(b, "up", "up", "--data", f.data, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--action-cache-updates")
	c := dial(b, f.endpoint(b))
	result, digests := cacheResults(b, c)
	calls := map[string]func(i int) error{
		"update": func(i int) error {
			_, err := c.actions.UpdateActionResult(b.Context(), &repb.UpdateActionResultRequest{ActionDigest: digests[i], ActionResult: result})
			return err
		},
		"get": func(i int) error {
			got, err := c.actions.GetActionResult(b.Context(), &repb.GetActionResultRequest{ActionDigest: digests[i]})
			if err == nil && len(got.GetOutputFiles()) != len(result.GetOutputFiles()) {
				err = fmt.Errorf("a result with %d files", len(got.GetOutputFiles()))
			}
			return err
		},
	}
	for _, name := range []string{"update", "get"} {
		for _, concurrency := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s/concurrency=%d", name, concurrency), func(b *testing.B) {
				took := make([]time.Duration, b.N)
				var next atomic.Int64
				var clients errgroup.Group
				b.ResetTimer()
				for range concurrency {
					clients.Go(func() error {
						for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
							began := time.Now()
							if err := calls[name](int(i % cachedActions)); err != nil {
								return err
							}
							took[i] = time.Since(began)
						}
						return nil
					})
				}
				if err := clients.Wait(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				reportLatency(b, took)
			})
		}
	}
}

// cacheResults uploads actions, their common Command and the output files of their common result,
// and stores that for each.
func cacheResults(b *testing.B, c *client) (*repb.ActionResult, []*repb.Digest) {
	b.Helper()
	result := &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "worker"}}
	var blobs [][]byte
	for i := range 4 {
		blob := random(fmt.Sprint("output ", i), 2<<10)
		blobs = append(blobs, blob)
		path := fmt.Sprintf("bazel-out/k8-fastbuild/bin/some/package/output%d.o", i)
		result.OutputFiles = append(result.OutputFiles, &repb.OutputFile{Path: path, Digest: digestOf(blob)})
	}
	var digests []*repb.Digest
	for i := range cachedActions {
		a := newAction(b, fmt.Sprint("cached ", i), &repb.Directory{}, &repb.Command{Arguments: []string{"/bin/true"}})
		digests, blobs = append(digests, a.digest), append(blobs, a.blobs[len(a.blobs)-1])
		if i == 0 {
			blobs = append(blobs, a.blobs...)
		}
	}
	if err := c.put(b.Context(), blobs...); err != nil {
		b.Fatal(err)
	}
	for _, d := range digests {
		if _, err := c.actions.UpdateActionResult(b.Context(), &repb.UpdateActionResultRequest{ActionDigest: d, ActionResult: result}); err != nil {
			b.Fatal(err)
		}
	}
	return result, digests
}
