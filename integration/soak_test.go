package integration_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
)

// The soak writes many times what the store may hold, with a hot set that is asked for again and again.
// Its parts are numbers of the aim that it proves, see docs/PERFORMANCE.md.
const (
	soakBudget  = 1 << 30
	soakWrites  = 20 << 30
	soakHot     = soakBudget / 10
	soakLargest = 64 << 20
	// soakTouch is after how many bytes of writes the whole hot set was asked for once more.
	soakTouch = soakBudget / 10
	// soakSlower is how much slower a put may be at its 99th percentile than in a store that never evicts.
	soakSlower = 3
)

// TestSoakCAS takes minutes: make soak-cas.
func TestSoakCAS(t *testing.T) {
	if os.Getenv("JETFARM_SOAK") == "" {
		t.Skip("JETFARM_SOAK is not set; make soak-cas sets it")
	}
	writes := int64(soakWrites)
	if text := os.Getenv("JETFARM_SOAK_BYTES"); text != "" {
		var err error
		if writes, err = strconv.ParseInt(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	calm := runSoak(t, writes/5, "--cas-size", "100GiB", "--max-store", "110GiB")
	busy := runSoak(t, writes, "--cas-size", "1GiB")
	t.Logf("%-22s %12s %12s %12s %12s %10s", "", "put 16 KiB", "", "put 1 MiB", "", "MB/s")
	t.Logf("%-22s %12s %12s %12s %12s", "", "p50", "p99", "p50", "p99")
	for _, s := range []*soak{calm, busy} {
		t.Logf("%-22s %12v %12v %12v %12v %10.0f", s.name, s.small.at(0.5), s.small.at(0.99), s.large.at(0.5), s.large.at(0.99), s.rate)
	}
	t.Logf("most bytes: streams %d MiB, files %d MiB, of %d MiB; rotations %.0f; copied forward %.0f blobs, %.0f MiB; hot blobs uploaded again: %d of %d",
		busy.streams>>20, busy.files>>20, soakBudget>>20, busy.rotations, busy.copied, busy.copiedBytes/(1<<20), busy.lost, len(busy.hot))
	if busy.streams > soakBudget+soakLargest || busy.files > soakBudget+soakLargest {
		t.Errorf("the streams had %d bytes and the files %d, want at most the budget of %d and one blob", busy.streams, busy.files, soakBudget)
	}
	if busy.lost > 0 {
		t.Errorf("%d times a hot blob was gone", busy.lost)
	}
	for name, l := range map[string][2]*latencies{"16 KiB": {&calm.small, &busy.small}, "1 MiB": {&calm.large, &busy.large}} {
		if before, after := l[0].at(0.99), l[1].at(0.99); after > soakSlower*before {
			t.Errorf("a put of %s takes %v at its 99th percentile while generations come and go, want at most %d times %v", name, after, soakSlower, before)
		}
	}
}

// latencies are how long calls took.
type latencies struct {
	mu   sync.Mutex
	took []time.Duration // guarded by mu
}

func (l *latencies) time(call func() error) error {
	began := time.Now()
	err := call()
	l.mu.Lock()
	l.took = append(l.took, time.Since(began))
	l.mu.Unlock()
	return err
}

func (l *latencies) at(quantile float64) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	slices.Sort(l.took)
	if len(l.took) == 0 {
		return 0
	}
	return l.took[int(quantile*float64(len(l.took)-1))].Round(10 * time.Microsecond)
}

// soak is one run of the load and what was seen of it.
type soak struct {
	name    string
	client  *client
	hot     [][]byte
	written atomic.Int64

	small, large                   latencies
	rate                           float64 // MB/s
	streams, files                 int64   // most bytes
	rotations, copied, copiedBytes float64
	lost                           int // times that a hot blob was missing
}

func runSoak(t *testing.T, writes int64, flags ...string) *soak {
	t.Helper()
	data := dataDir(t)
	up := start(t, "up", append([]string{"up", "--data", data, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"}, flags...)...)
	metrics := "http://" + up.field(t, "http") + "/metrics"
	s := &soak{name: strings.Join(flags, " "), client: dial(t, up.field(t, "grpc"))}
	fillHot(t, s)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	began := time.Now()
	var load, beside errgroup.Group
	load.Go(func() error { return s.writeLarge(ctx, writes, 1<<20, 16) })
	load.Go(func() error { return s.writeLarge(ctx, writes, 4<<20, soakLargest>>22) })
	beside.Go(func() error { return s.writeSmall(ctx) })
	beside.Go(func() error { return s.touch(ctx) })
	beside.Go(func() error {
		for ctx.Err() == nil {
			s.files = max(s.files, diskUsage(t, filepath.Join(data, "nats")))
			s.streams = max(s.streams, int64(metric(t, metrics, "jetfarm_cas_stored_bytes"))) //nolint:contextcheck // httpGet has its own
			pause(ctx, 100*time.Millisecond)
		}
		return nil
	})
	if err := load.Wait(); err != nil {
		t.Errorf("write: %v", err)
	}
	s.rate = float64(s.written.Load()) / 1e6 / time.Since(began).Seconds()
	cancel()
	if err := beside.Wait(); err != nil {
		t.Errorf("beside the writes: %v", err)
	}
	s.rotations = metric(t, metrics, "jetfarm_cas_rotations_total")
	s.copied = metric(t, metrics, "jetfarm_cas_copied_blobs_total")
	s.copiedBytes = metric(t, metrics, "jetfarm_cas_copied_bytes_total")
	for _, blob := range s.hot {
		var got bytes.Buffer
		if err := s.client.read(t.Context(), digestOf(blob), &got); err != nil || !bytes.Equal(got.Bytes(), blob) {
			t.Errorf("a hot blob of %d bytes: %d bytes, error %v", len(blob), got.Len(), err)
		}
	}
	up.stop(t)
	return s
}

// fresh returns bytes that nobody has seen and that do not compress.
func fresh(n int) []byte {
	seed := sha256.Sum256(strconv.AppendUint(nil, rand.Uint64(), 36))
	blob := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(blob) //nolint:errcheck // it never fails
	return blob
}

// fillHot stores the hot set: half of its bytes are small blobs.
func fillHot(t *testing.T, s *soak) {
	t.Helper()
	for size := 0; size < soakHot; {
		n := 16 << 10
		if len(s.hot)%65 == 64 {
			n = 1 << 20
		}
		blob := fresh(n)
		if err := s.client.write(t.Context(), digestOf(blob), blob); err != nil {
			t.Fatal(err)
		}
		s.hot = append(s.hot, blob)
		size += n
	}
}

// writeLarge writes new blobs until all writers have written enough: most of one size, and each
// nth of so many times that size.
func (s *soak) writeLarge(ctx context.Context, enough int64, size, times int) error {
	for i := 1; s.written.Load() < enough; i++ {
		n := size
		if i%(8*times) == 0 {
			n *= times
		}
		blob := fresh(n)
		d := digestOf(blob)
		write := func() error { return s.client.write(ctx, d, blob) }
		var err error
		if n == 1<<20 {
			err = s.large.time(write)
		} else {
			err = write()
		}
		if err != nil {
			return fmt.Errorf("%d bytes: %w", n, err)
		}
		s.written.Add(int64(n))
	}
	return nil
}

// writeSmall puts small blobs one after another.
func (s *soak) writeSmall(ctx context.Context) error {
	for ctx.Err() == nil {
		blob := fresh(16 << 10)
		if err := s.small.time(func() error { return s.client.put(ctx, blob) }); err != nil && ctx.Err() == nil {
			return err
		}
		s.written.Add(int64(len(blob)))
	}
	return nil
}

// touch asks for the hot set, and uploads again what is gone as a client does.
func (s *soak) touch(ctx context.Context) error {
	const part = 200
	next := int64(0)
	for ctx.Err() == nil {
		for blobs := range slices.Chunk(s.hot, part) {
			for ctx.Err() == nil && s.written.Load() < next {
				pause(ctx, time.Millisecond)
			}
			next = s.written.Load() + int64(soakTouch*len(blobs)/len(s.hot))
			if err := s.ask(ctx, blobs); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
	return nil
}

func (s *soak) ask(ctx context.Context, blobs [][]byte) error {
	request := &repb.FindMissingBlobsRequest{}
	byHash := make(map[string][]byte)
	for _, blob := range blobs {
		d := digestOf(blob)
		request.BlobDigests = append(request.BlobDigests, d)
		byHash[d.GetHash()] = blob
	}
	response, err := s.client.blobs.FindMissingBlobs(ctx, request)
	if err != nil {
		return err
	}
	s.lost += len(response.GetMissingBlobDigests())
	for _, d := range response.GetMissingBlobDigests() {
		if err := s.client.write(ctx, d, byHash[d.GetHash()]); err != nil {
			return err
		}
	}
	return nil
}

// diskUsage is the bytes of all files below a directory.
func diskUsage(t testing.TB, dir string) (total int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			var info fs.FileInfo
			if info, err = e.Info(); err == nil {
				total += info.Size()
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted meanwhile
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return total
}

// metric returns the value of a metric without labels.
func metric(t testing.TB, url, name string) float64 {
	t.Helper()
	lines := bufio.NewScanner(strings.NewReader(httpGet(t, url)))
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				t.Error(err)
			}
			return value
		}
	}
	t.Errorf("there is no metric %s", name)
	return 0
}
