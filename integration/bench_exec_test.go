package integration_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
)

// reportStages reports the median times that the client of a run can't see as a whole: from the queue to the
// start of a worker, and from the end of the command to the result at the client. All parts of the farm
// have the clock of this machine.
func reportStages(b *testing.B, runs []run) {
	b.Helper()
	start, end := make([]time.Duration, len(runs)), make([]time.Duration, len(runs))
	for i, r := range runs {
		meta := r.response.GetResult().GetExecutionMetadata()
		start[i] = meta.GetWorkerStartTimestamp().AsTime().Sub(meta.GetQueuedTimestamp().AsTime())
		end[i] = r.ended.Sub(meta.GetExecutionCompletedTimestamp().AsTime())
	}
	b.ReportMetric(median(start), "queued-ms")
	b.ReportMetric(median(end), "end-ms")
}

// run is what a client knows of an action that has run.
type run struct {
	took     time.Duration
	ended    time.Time
	response *repb.ExecuteResponse
}

// runAll runs the actions from so many clients at once.
func runAll(b *testing.B, c *client, concurrency int, actions []*repb.Digest) []run {
	b.Helper()
	runs := make([]run, len(actions))
	var next atomic.Int64
	var clients errgroup.Group
	for range concurrency {
		clients.Go(func() error {
			for i := next.Add(1) - 1; i < int64(len(actions)); i = next.Add(1) - 1 {
				began := time.Now()
				response, err := c.execute(b.Context(), actions[i])
				if err != nil {
					return err
				}
				runs[i] = run{took: time.Since(began), ended: time.Now(), response: response}
			}
			return nil
		})
	}
	if err := clients.Wait(); err != nil {
		b.Fatal(err)
	}
	return runs
}

func tookOf(runs []run) []time.Duration {
	took := make([]time.Duration, len(runs))
	for i, r := range runs {
		took[i] = r.took
	}
	return took
}

// An action that has run before, from Execute to its result, which the action cache has.
func BenchmarkExecuteHit(b *testing.B) {
	c := dial(b, startUp(b).endpoint(b))
	actions := uploadNoops(b, c, 100)
	runAll(b, c, 4, actions)
	for _, concurrency := range []int{1, 32} {
		b.Run(fmt.Sprintf("concurrency=%d", concurrency), func(b *testing.B) {
			asked := make([]*repb.Digest, b.N)
			for i := range asked {
				asked[i] = actions[i%len(actions)]
			}
			b.ResetTimer()
			runs := runAll(b, c, concurrency, asked)
			b.StopTimer()
			for _, r := range runs {
				if !r.response.GetCachedResult() {
					b.Fatal(errors.New("a result is not from the action cache"))
				}
			}
			reportLatency(b, tookOf(runs))
		})
	}
}

// BenchmarkExecute with three brokers that each have everything, a frontend and a worker.
func BenchmarkExecuteCluster(b *testing.B) {
	c := dial(b, startCluster(b).endpoint(b))
	for _, concurrency := range []int{1, 8} {
		b.Run(fmt.Sprintf("concurrency=%d", concurrency), func(b *testing.B) {
			actions := uploadNoops(b, c, b.N)
			b.ResetTimer()
			runs := runAll(b, c, concurrency, actions)
			b.StopTimer()
			reportLatency(b, tookOf(runs))
			reportStages(b, runs)
		})
	}
}

// startCluster starts a farm on a cluster of three brokers.
func startCluster(t testing.TB) *splitFarm {
	t.Helper()
	f := &splitFarm{data: dataDir(t)}
	routes, urls := freeAddresses(t, 3), make([]string, 3)
	brokers := make([]*process, len(routes))
	var started errgroup.Group
	for i := range brokers {
		name := "broker" + strconv.Itoa(i)
		started.Go(func() error {
			brokers[i] = start(t, name, "broker", "--data", filepath.Join(f.data, name), "--name", name, "--listen", "127.0.0.1:0",
				"--http", "127.0.0.1:0", "--cluster", routes[i], "--routes", "nats://"+strings.Join(routes, ",nats://"))
			return nil
		})
	}
	if err := started.Wait(); err != nil || t.Failed() {
		t.Fatal("a broker did not start: ", err)
	}
	for i, p := range brokers {
		urls[i] = p.field(t, "nats")
	}
	all := strings.Join(urls, ",")
	f.frontends = []*process{start(t, "frontend", "frontend", "--nats", all, "--replicas", "3", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")}
	f.workers = []*process{start(t, "worker", "worker", "--nats", all, "--data", filepath.Join(f.data, "worker"),
		"--http", "127.0.0.1:0", "--concurrency", strconv.Itoa(slots))}
	return f
}
