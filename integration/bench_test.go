package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The benchmarks measure a farm from outside, client and all, on one machine. docs/PERFORMANCE.md
// has their numbers.

// A no-op action that nobody has run before, from Execute to its result; its blobs are there.
func BenchmarkExecute(b *testing.B) {
	c := dial(b, startUp(b).endpoint(b))
	for _, concurrency := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("concurrency=%d", concurrency), func(b *testing.B) {
			actions := uploadNoops(b, c, b.N)
			b.ResetTimer()
			runs := runAll(b, c, concurrency, actions)
			b.StopTimer()
			for _, r := range runs {
				if err := checkRan(r.response); err != nil {
					b.Fatal(err)
				}
			}
			reportLatency(b, tookOf(runs))
			reportStages(b, runs)
		})
	}
}

func uploadNoops(b *testing.B, c *client, n int) []*repb.Digest {
	b.Helper()
	run := strconv.FormatUint(rand.Uint64(), 36)
	var actions []*repb.Digest
	var blobs [][]byte
	for i := range n {
		a := newAction(b, run+strconv.Itoa(i), &repb.Directory{}, &repb.Command{Arguments: []string{"/bin/true"}})
		actions, blobs = append(actions, a.digest), append(blobs, a.blobs...)
		if len(blobs) >= 1000 || i == n-1 {
			if err := c.put(b.Context(), blobs...); err != nil {
				b.Fatal(err)
			}
			blobs = nil
		}
	}
	return actions
}

func reportLatency(b *testing.B, took []time.Duration) {
	b.Helper()
	b.ReportMetric(median(took), "p50-ms")
	b.ReportMetric(at(took, 0.99), "p99-ms")
	b.ReportMetric(float64(len(took))/b.Elapsed().Seconds(), "actions/s")
}

func median(took []time.Duration) float64 { return at(took, 0.5) }

// at sorts the times and returns a quantile of them in milliseconds.
func at(took []time.Duration, quantile float64) float64 {
	slices.Sort(took)
	return float64(took[int(quantile*float64(len(took)-1))].Microseconds()) / 1000
}

// Half of the blobs are there.
func BenchmarkFindMissing(b *testing.B) {
	c := dial(b, startUp(b).endpoint(b))
	for _, digests := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("digests=%d", digests), func(b *testing.B) {
			request := &repb.FindMissingBlobsRequest{}
			var present [][]byte
			for i := range digests {
				blob := random(fmt.Sprint("find ", digests, i), 100)
				request.BlobDigests = append(request.BlobDigests, digestOf(blob))
				if i%2 == 0 {
					present = append(present, blob)
				}
			}
			for part := range slices.Chunk(present, 1000) {
				if err := c.put(b.Context(), part...); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				response, err := c.blobs.FindMissingBlobs(b.Context(), request)
				if err != nil {
					b.Fatal(err)
				}
				if got := len(response.GetMissingBlobDigests()); got != digests/2 {
					b.Fatalf("%d blobs are missing, want %d", got, digests/2)
				}
			}
		})
	}
}

// A thousand blobs of 1 KiB in one request, new ones in each.
func BenchmarkBatchWrite(b *testing.B) {
	c := dial(b, startUp(b).endpoint(b))
	b.SetBytes(1000 << 10)
	run := rand.Uint64()
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		blobs := thousand(fmt.Sprint(run, i))
		b.StartTimer()
		if err := c.put(b.Context(), blobs...); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBatchRead(b *testing.B) {
	c := dial(b, startUp(b).endpoint(b))
	blobs := thousand("read")
	if err := c.put(b.Context(), blobs...); err != nil {
		b.Fatal(err)
	}
	request := &repb.BatchReadBlobsRequest{}
	for _, blob := range blobs {
		request.Digests = append(request.Digests, digestOf(blob))
	}
	b.SetBytes(1000 << 10)
	for b.Loop() {
		response, err := c.blobs.BatchReadBlobs(b.Context(), request)
		if err != nil {
			b.Fatal(err)
		}
		for i, r := range response.GetResponses() {
			if !bytes.Equal(r.GetData(), blobs[i]) {
				b.Fatalf("blob %d came back different: %v", i, r.GetStatus())
			}
		}
	}
}

func thousand(seed string) [][]byte {
	blobs := make([][]byte, 1000)
	for i := range blobs {
		blobs[i] = random(seed+strconv.Itoa(i), 1<<10)
	}
	return blobs
}

const large = 64 << 20

func BenchmarkByteStreamWrite(b *testing.B) {
	c := dial(b, startUp(b).endpoint(b))
	blob := random("stream", large)
	b.SetBytes(large)
	for b.Loop() {
		b.StopTimer()
		copy(blob, strconv.FormatUint(rand.Uint64(), 36)) // a blob that is not there yet
		d := digestOf(blob)
		b.StartTimer()
		if err := c.write(b.Context(), d, blob); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkByteStreamRead(b *testing.B) {
	c := dial(b, startUp(b).endpoint(b))
	blob := random("stream", large)
	d := digestOf(blob)
	if err := c.write(b.Context(), d, blob); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(large)
	for b.Loop() {
		if err := c.read(b.Context(), d, io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

// Memory of a frontend for each Execute stream that waits: what is resident just after they came, which
// is garbage for the most part, and what is in use of heap and stacks after a collection. The number of streams is
// fixed, so the time of an operation says nothing.
func BenchmarkWaitingStream(b *testing.B) {
	const streams, actions = 5000, 50
	b.Setenv("JETFARM_PPROF", "true") // collects garbage when asked for a profile of the heap
	f := startSplit(b, 1, 1)
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	c := dial(b, f.endpoint(b))
	before, inUseBefore := resident(b, f.frontends[0]), inUse(b, f.frontends[0])
	var opened, open errgroup.Group
	for i := range streams {
		a := shell(b, fmt.Sprint("wait ", i%actions), "sleep 20")
		opened.Go(func() error {
			if err := c.put(ctx, a.blobs...); err != nil {
				return err
			}
			stream, err := c.runs.Execute(ctx, &repb.ExecuteRequest{ActionDigest: a.digest})
			if err != nil {
				return err
			}
			if _, err := stream.Recv(); err != nil {
				return err
			}
			open.Go(func() error {
				_, err := result(stream)
				return err
			})
			return nil
		})
	}
	if err := opened.Wait(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(resident(b, f.frontends[0])-before)/streams/1024, "KiB/stream")
	for kind, n := range inUse(b, f.frontends[0]) {
		b.ReportMetric((n-inUseBefore[kind])/streams/1024, kind+"-KiB/stream")
	}
	cancel()
	if err := open.Wait(); status.Code(err) != codes.Canceled {
		b.Errorf("a waiting stream ended with %v", err)
	}
}

// inUse returns what a process has allocated on its heap and for stacks after a garbage collection, in bytes.
func inUse(b testing.TB, p *process) map[string]float64 {
	b.Helper()
	url := "http://" + p.field(b, "http")
	httpGet(b, url+"/debug/pprof/heap?gc=1&debug=1")
	return map[string]float64{
		"heap":  metric(b, url+"/metrics", "go_memstats_heap_alloc_bytes"),
		"stack": metric(b, url+"/metrics", "go_memstats_stack_inuse_bytes"),
	}
}

// resident returns the resident memory of a process in bytes.
func resident(b testing.TB, p *process) int64 {
	b.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.pid()), "status"))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	b.Fatal("no VmRSS in the status of the process")
	return 0
}
