package integration_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

const (
	scaleFew  = 10_000
	scaleMany = 1_000_000
	scaleSize = 2 << 10
	// scaleSlower is how much dearer calls may be with many blobs than with few.
	scaleSlower = 1.3
	// scaleReady bounds the restart with many blobs.
	scaleReady = 15 * time.Second
	// scaleRounds is how often each call is made. The median counts.
	scaleRounds = 400
	// scaleSettle is longer than the broker keeps blocks in memory that nobody uses.
	scaleSettle = 15 * time.Second
)

// TestScaleCAS compares a store of few blobs with one of many and takes minutes: make scale-cas.
func TestScaleCAS(t *testing.T) {
	if os.Getenv("JETFARM_SCALE") == "" {
		t.Skip("JETFARM_SCALE is not set; make scale-cas sets it")
	}
	many := scaleMany
	if text := os.Getenv("JETFARM_SCALE_BLOBS"); text != "" {
		var err error
		if many, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	f := &allInOne{data: dataDir(t)}
	f.start(t)
	var s scale
	s.grow(t, f, scaleFew)
	few, fewBytes := s.measure(t, f), resident(t, f.up)
	s.grow(t, f, many)
	grown, manyBytes := s.measure(t, f), resident(t, f.up)

	f.up.stop(t)
	began := time.Now()
	f.start(t)
	ready := time.Since(began)
	back := s.measure(t, f)
	t.Logf("%-30s %12s %12s %12s", "", fmt.Sprint(scaleFew), fmt.Sprint(many), "restarted")
	for i, c := range few {
		t.Logf("%-30s %12v %12v %12v", c.name, c.median, grown[i].median, back[i].median)
	}
	t.Logf("ready %v after the restart with %d blobs; resident %d MiB with %d, %d MiB with %d (%d bytes a blob), %d MiB restarted",
		ready.Round(time.Millisecond), many, fewBytes>>20, scaleFew, manyBytes>>20, many, (manyBytes-fewBytes)/int64(many-scaleFew), resident(t, f.up)>>20)
	if ready > scaleReady {
		t.Errorf("ready %v after the restart, want less than %v", ready, scaleReady)
	}
	for i, c := range few {
		if c.bound && float64(grown[i].median) > scaleSlower*float64(c.median) {
			t.Errorf("%s takes %v with %d blobs, want at most %v times the %v with %d", c.name, grown[i].median, many, scaleSlower, c.median, scaleFew)
		}
	}
}

// scale is the blobs of a store, of which only the seeds are kept.
type scale struct {
	blobs []*repb.Digest
}

// cost is how long a call took.
type cost struct {
	name   string
	median time.Duration
	bound  bool // must not grow
	// prepare returns the call.
	prepare func() func() error
}

// grow stores blobs until there are so many.
func (s *scale) grow(t *testing.T, f *allInOne, n int) {
	t.Helper()
	c := dial(t, f.endpoint(t))
	for len(s.blobs) < n {
		var batch [][]byte
		for range min(1000, n-len(s.blobs)) {
			batch = append(batch, fresh(scaleSize))
		}
		if err := c.put(t.Context(), batch...); err != nil {
			t.Fatal(err)
		}
		for _, blob := range batch {
			s.blobs = append(s.blobs, digestOf(blob))
		}
	}
}

// measure makes each call many times, after the broker has given back what it keeps of recent writes.
func (s *scale) measure(t *testing.T, f *allInOne) []cost {
	t.Helper()
	pause(t.Context(), scaleSettle)
	c := dial(t, f.endpoint(t))
	// What a call asks for is put together before, so that the client's memory does not count.
	pick := func(from []*repb.Digest, n int) []*repb.Digest {
		picked := make([]*repb.Digest, n)
		for i := range picked {
			d := from[rand.IntN(len(from))]
			picked[i] = &repb.Digest{Hash: strings.Clone(d.GetHash()), SizeBytes: d.GetSizeBytes()}
		}
		return picked
	}
	put := func(n int) func() func() error {
		return func() func() error {
			blobs := make([][]byte, n)
			for i := range blobs {
				blobs[i] = fresh(scaleSize)
			}
			return func() error { return c.put(t.Context(), blobs...) }
		}
	}
	get := func(from []*repb.Digest) func() func() error {
		return func() func() error {
			d := pick(from, 1)[0]
			return func() error {
				_, err := c.get(t.Context(), d)
				return err
			}
		}
	}
	find := func() func() error {
		request := &repb.FindMissingBlobsRequest{BlobDigests: pick(s.blobs, 1000)}
		return func() error {
			response, err := c.blobs.FindMissingBlobs(t.Context(), request)
			if err == nil && len(response.GetMissingBlobDigests()) > 0 {
				err = errors.New("blobs are missing")
			}
			return err
		}
	}
	costs := []cost{
		{name: "put 1", bound: true, prepare: put(1)},
		{name: "put 100", bound: true, prepare: put(100)},
		{name: "get 1 of the last 10 000", bound: true, prepare: get(s.blobs[len(s.blobs)-scaleFew:])},
		{name: "FindMissing 1000 of all", bound: true, prepare: find},
		{name: "get 1 of all", bound: true, prepare: get(s.blobs)},
	}
	for i := range costs {
		var l latencies
		for range scaleRounds {
			if err := l.time(costs[i].prepare()); err != nil {
				t.Fatalf("%s: %v", costs[i].name, err)
			}
		}
		costs[i].median = l.at(0.5)
	}
	return costs
}
