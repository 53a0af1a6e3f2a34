package integration_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"slices"
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
	// scaleRounds is how often each call is made in each farm, and scaleTurn how often in a row. The median
	// counts.
	scaleRounds = 400
	scaleTurn   = 20
	// scaleSettle is longer than the broker keeps blocks in memory that nobody uses.
	scaleSettle = 15 * time.Second
)

// TestScaleCAS compares a store of few blobs with one of many and takes minutes: make scale-cas. Both farms
// run at the same time and their calls take turns, so that what else the machine does is the same for both.
func TestScaleCAS(t *testing.T) {
	if os.Getenv("JETFARM_SCALE") == "" {
		t.Skip("JETFARM_SCALE is not set; make scale-cas sets it")
	}
	blobs := scaleMany
	if text := os.Getenv("JETFARM_SCALE_BLOBS"); text != "" {
		var err error
		if blobs, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	few, many := startScale(t, scaleFew), startScale(t, blobs)
	grown := measure(t, few, many)
	fewBytes, manyBytes := resident(t, few.up), resident(t, many.up)
	few.up.stop(t)
	few.start(t)
	many.up.stop(t)
	began := time.Now()
	many.start(t)
	ready := time.Since(began)
	restarted := measure(t, few, many)

	t.Logf("%-30s %12d %12d, and after a restart", "", scaleFew, blobs)
	for i, c := range grown {
		r := restarted[i]
		t.Logf("%-30s %12v %12v   %12v %12v", c.name, c.few, c.many, r.few, r.many)
	}
	t.Logf("ready %v after the restart with %d blobs; resident %d MiB with %d, %d MiB with %d (%d bytes a blob), %d MiB restarted",
		ready.Round(time.Millisecond), blobs, fewBytes>>20, scaleFew, manyBytes>>20, blobs, (manyBytes-fewBytes)/int64(blobs-scaleFew), resident(t, many.up)>>20)
	if ready > scaleReady {
		t.Errorf("ready %v after the restart, want less than %v", ready, scaleReady)
	}
	for _, c := range slices.Concat(grown, restarted) {
		if float64(c.many) > scaleSlower*float64(c.few) {
			t.Errorf("%s takes %v with %d blobs, want at most %v times the %v with %d", c.name, c.many, blobs, scaleSlower, c.few, scaleFew)
		}
	}
}

// scale is a farm and the blobs in it.
type scale struct {
	*allInOne
	blobs []*repb.Digest
}

func startScale(t *testing.T, blobs int) *scale {
	t.Helper()
	s := &scale{allInOne: &allInOne{data: dataDir(t)}}
	s.start(t)
	s.grow(t, blobs)
	return s
}

// cost is how long a call takes with few and with many blobs.
type cost struct {
	name      string
	few, many time.Duration
}

// grow stores blobs until there are so many.
func (s *scale) grow(t *testing.T, n int) {
	t.Helper()
	c := dial(t, s.endpoint(t))
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

// measure makes each call many times in both farms, after their brokers have given back what they keep of
// recent writes.
func measure(t *testing.T, few, many *scale) []cost {
	t.Helper()
	pause(t.Context(), scaleSettle)
	fewCalls, manyCalls := few.calls(t), many.calls(t)
	costs := make([]cost, len(fewCalls))
	for i := range costs {
		var fewTimes, manyTimes latencies
		for range scaleRounds / scaleTurn {
			for range scaleTurn {
				fewCalls[i].time(t, &fewTimes)
			}
			for range scaleTurn {
				manyCalls[i].time(t, &manyTimes)
			}
		}
		costs[i] = cost{name: fewCalls[i].name, few: fewTimes.at(0.5), many: manyTimes.at(0.5)}
	}
	return costs
}

// call is one whose time is measured.
type call struct {
	name string
	// prepare returns it.
	prepare func() func() error
}

func (c call) time(t *testing.T, l *latencies) {
	t.Helper()
	if err := l.time(c.prepare()); err != nil {
		t.Fatalf("%s: %v", c.name, err)
	}
}

func (s *scale) calls(t *testing.T) []call {
	t.Helper()
	c := dial(t, s.endpoint(t))
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
	return []call{
		{name: "put 1", prepare: put(1)},
		{name: "put 100", prepare: put(100)},
		{name: "get 1 of the last 10 000", prepare: get(s.blobs[len(s.blobs)-scaleFew:])},
		{name: "get 1 of all", prepare: get(s.blobs)},
		{name: "FindMissing 1000 of all", prepare: find},
	}
}
