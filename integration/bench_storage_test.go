package integration_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
)

// A blob of 1 KiB is read while nothing else goes on, and while another client uploads blobs of
// 64 MiB without a pause. Each read is of another blob, so that none comes from a cache in memory.
func BenchmarkSmallRead(b *testing.B) {
	for _, busy := range []bool{false, true} {
		b.Run(fmt.Sprintf("upload=%v", busy), func(b *testing.B) {
			endpoint := startUp(b).endpoint(b)
			c := dial(b, endpoint)
			blobs := putMany(b, c, b.N)
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			var uploader errgroup.Group
			if busy {
				other := dial(b, endpoint)
				uploader.Go(func() error { return uploadForEver(ctx, other) })
			}
			took := make([]time.Duration, b.N)
			b.ResetTimer()
			for i := range b.N {
				began := time.Now()
				if _, err := c.get(ctx, blobs[i]); err != nil {
					b.Fatal(err)
				}
				took[i] = time.Since(began)
			}
			b.StopTimer()
			cancel()
			if err := uploader.Wait(); err != nil && !errors.Is(err, context.Canceled) {
				b.Fatal(err)
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
		})
	}
}

// putMany uploads n blobs of 1 KiB and returns their digests.
func putMany(b *testing.B, c *client, n int) []*repb.Digest {
	b.Helper()
	run := strconv.FormatUint(rand.Uint64(), 36)
	digests := make([]*repb.Digest, 0, n)
	for len(digests) < n {
		var blobs [][]byte
		for len(blobs) < 1000 && len(digests) < n {
			blob := random(run+strconv.Itoa(len(digests)), 1<<10)
			blobs, digests = append(blobs, blob), append(digests, digestOf(blob))
		}
		if err := c.put(b.Context(), blobs...); err != nil {
			b.Fatal(err)
		}
	}
	return digests
}

func uploadForEver(ctx context.Context, c *client) error {
	blob := random("uploads for ever", large)
	for ctx.Err() == nil {
		copy(blob, strconv.FormatUint(rand.Uint64(), 36))
		if err := c.write(ctx, digestOf(blob), blob); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// The first question after a restart: the index has just been built and nothing is warm. Starting the timer of a
// benchmark costs as much as the question, so this one has a clock of its own.
func BenchmarkFindMissingCold(b *testing.B) {
	f := startUp(b)
	c := dial(b, f.endpoint(b))
	digests := putMany(b, c, 20_000)
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprintf("digests=%d", n), func(b *testing.B) {
			var took []time.Duration
			for b.Loop() {
				f.restart(b)
				c := dial(b, f.endpoint(b))
				if _, err := c.blobs.FindMissingBlobs(b.Context(), &repb.FindMissingBlobsRequest{}); err != nil { // connects
					b.Fatal(err)
				}
				began := time.Now()
				response, err := c.blobs.FindMissingBlobs(b.Context(), &repb.FindMissingBlobsRequest{BlobDigests: digests[:n]})
				took = append(took, time.Since(began))
				if err != nil {
					b.Fatal(err)
				}
				if n := len(response.GetMissingBlobDigests()); n > 0 {
					b.Fatalf("%d blobs are missing after a restart", n)
				}
			}
			b.ReportMetric(median(took), "first-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}
