package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// stormCancels is how many calls TestCancelsInAStormLeaveNothing cancels. `make soak-cancels` raises it.
func stormCancels(t *testing.T) int {
	t.Helper()
	text, set := os.LookupEnv("JETFARM_CANCELS")
	if !set {
		return 40
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("JETFARM_CANCELS=%q is not a number of cancels", text)
	}
	return n
}

// A storm is a farm whose frontend reaches its broker and another farm behind it through connections that
// break, and its clients.
type storm struct {
	brokerLink, backLink *forwarder
	broker, front        *process
	back                 *process
	worker               *process
	backArgs             []string
	data                 string
	client               *client

	uploads [][]byte  // what clients upload
	behind  [][]byte  // what only the farm behind has, at first
	actions []*action // what they execute
}

func startStorm(t *testing.T) *storm {
	t.Helper()
	s := &storm{data: dataDir(t)}
	s.broker = start(t, "broker", "broker", "--data", filepath.Join(s.data, "broker"), "--listen", "127.0.0.1:0")
	s.brokerLink = startForwarder(t, hostPort(t, s.broker.field(t, "nats")))
	s.worker = start(t, "worker", "worker", "--nats", s.broker.field(t, "nats"), "--data", filepath.Join(s.data, "worker"),
		"--http", "127.0.0.1:0", "--concurrency", strconv.Itoa(slots))
	backData := dataDir(t)
	s.back = startBehind(t, "back", backData, "--action-cache-updates")
	s.backArgs = []string{"up", "--data", backData, "--grpc", s.back.field(t, "grpc"), "--http", "127.0.0.1:0", "--action-cache-updates"}
	s.backLink = startForwarder(t, s.back.field(t, "grpc"))
	s.front = start(t, "front", "frontend", "--nats", "nats://"+s.brokerLink.addr(), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
		"--data", filepath.Join(s.data, "front"), "--upstream", "grpc://"+s.backLink.addr())
	s.client = dial(t, s.front.field(t, "grpc"))
	for i := range 12 {
		s.uploads = append(s.uploads, random(fmt.Sprint("storm upload ", i), []int{200, 300 << 10, 3<<20 + 5, 6 << 20}[i%4]))
		s.behind = append(s.behind, random(fmt.Sprint("storm behind ", i), []int{100 << 10, 2<<20 + 9, 7 << 20}[i%3]))
	}
	behind := dial(t, s.back.field(t, "grpc"))
	for _, blob := range s.behind {
		if err := behind.write(t.Context(), digestOf(blob), blob); err != nil {
			t.Fatal(err)
		}
	}
	behind.close()
	for i := range 20 {
		a := shell(t, fmt.Sprint("storm ", i), "sleep 0.1")
		if err := s.client.put(t.Context(), a.blobs...); err != nil {
			t.Fatal(err)
		}
		s.actions = append(s.actions, a)
	}
	return s
}

// call makes one of the calls of the storm.
func (s *storm) call(ctx context.Context, i int) error {
	switch n := i / 5; i % 5 {
	case 0:
		blob := s.uploads[n%len(s.uploads)]
		return s.client.write(ctx, digestOf(blob), blob)
	case 1:
		return s.client.read(ctx, digestOf(s.behind[n%len(s.behind)]), io.Discard)
	case 2:
		request := &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{digestOf(s.behind[0]), digestOf(s.uploads[0]), digestOf(s.behind[3])}}
		_, err := s.client.blobs.BatchReadBlobs(ctx, request)
		return err
	case 3:
		_, err := s.client.execute(ctx, s.actions[n%len(s.actions)].digest)
		return err
	default:
		return s.client.read(ctx, digestOf(s.uploads[n%len(s.uploads)]), io.Discard)
	}
}

// cancelCalls makes calls that end at random times, most of them before their ends, and counts how they end.
func (s *storm) cancelCalls(ctx context.Context, n int) (map[codes.Code]int, error) {
	var clients errgroup.Group
	var mu sync.Mutex // guards ends
	ends := make(map[codes.Code]int)
	clients.SetLimit(8)
	for range n {
		clients.Go(func() error {
			call := rand.IntN(60)
			bounded, cancel := context.WithTimeout(ctx, time.Duration(rand.IntN(120))*time.Millisecond)
			defer cancel()
			err := s.call(bounded, call)
			mu.Lock()
			ends[status.Code(err)]++
			mu.Unlock()
			switch status.Code(err) {
			case codes.OK, codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.NotFound:
				return nil
			default:
				return fmt.Errorf("call %d: %w", call, err)
			}
		})
	}
	return ends, clients.Wait()
}

// breakThings breaks connections and the farm behind at random until ctx ends, and leaves all whole.
func (s *storm) breakThings(ctx context.Context, t *testing.T) {
	t.Helper()
	kills := 0
	for ctx.Err() == nil {
		pause(ctx, time.Duration(20+rand.IntN(80))*time.Millisecond)
		switch rand.IntN(8) {
		case 0:
			s.brokerLink.cut()
		case 1:
			s.backLink.cut()
		case 2, 3, 4:
			s.backLink.stall(true)
			pause(ctx, time.Duration(rand.IntN(300))*time.Millisecond)
			s.backLink.stall(false)
		case 7:
			if kills++; kills > 3 {
				continue
			}
			s.back.kill(t)
			s.back = start(t, "back", s.backArgs...)
		}
	}
}

// complete uploads and reads everything, as clients do that have waited for the storm to end.
func (s *storm) complete(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	again := func(call func() error) error {
		for {
			err := call()
			// A farm behind that was down for a while is not asked for a while.
			if code := status.Code(err); code != codes.Unavailable && code != codes.NotFound || ctx.Err() != nil {
				return err
			}
			pause(ctx, 50*time.Millisecond)
		}
	}
	for _, blob := range s.uploads {
		if err := again(func() error { return s.client.write(ctx, digestOf(blob), blob) }); err != nil {
			t.Fatalf("upload of %d bytes: %v", len(blob), err)
		}
	}
	for _, blob := range slices.Concat(s.uploads, s.behind) {
		var got bytes.Buffer
		err := again(func() error { got.Reset(); return s.client.read(ctx, digestOf(blob), &got) })
		if err != nil || !bytes.Equal(got.Bytes(), blob) {
			t.Errorf("read of %d bytes: %d bytes, %v", len(blob), got.Len(), err)
		}
		soon(t, "the blob is here", func(ctx context.Context) bool { return !s.client.missing(ctx, digestOf(blob)) })
	}
	for _, a := range s.actions {
		if err := again(func() error { _, err := s.client.execute(ctx, a.digest); return err }); err != nil {
			t.Errorf("Execute: %v", err)
		}
	}
}

// remains is what there is of a farm at rest.
type remains struct {
	front, worker int // goroutines
	consumers     int
	jobs          uint64
	blobs         int64 // bytes in the buckets
	files         int   // that belong to something that goes on
}

func (s *storm) remains(t *testing.T, js jetstream.JetStream) remains {
	t.Helper()
	r := remains{front: goroutines(t, s.front), worker: goroutines(t, s.worker)}
	list := js.ListStreams(t.Context())
	for info := range list.Info() {
		r.consumers += info.State.Consumers
		if strings.HasPrefix(info.Config.Name, "OBJ_") {
			r.blobs += int64(info.State.Bytes)
		}
		if info.Config.Name == "JOBS" {
			r.jobs = info.State.Msgs
		}
	}
	if err := list.Err(); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(s.data, func(path string, _ fs.DirEntry, err error) error {
		if dir := filepath.Base(filepath.Dir(path)); err == nil && (dir == "tmp" || dir == "trash" || dir == "root") && !strings.Contains(path, "/broker/") {
			r.files++
		}
		return nil // what is gone by now is no remains
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// within tells whether nothing is more than it was.
func (r remains) within(before remains) bool {
	return r.front <= before.front && r.worker <= before.worker && r.consumers <= before.consumers && r.jobs <= before.jobs && r.files <= before.files
}

// Whatever clients cancel while connections break and the farm behind hangs and dies, nothing of it is left
// once all is whole again: no goroutine, consumer, job or file, and in the buckets nothing but the blobs,
// each once.
func TestX_33_X_48_X_109_CancelsInAStormLeaveNothing(t *testing.T) {
	s := startStorm(t)
	nc, err := nats.Connect(s.broker.field(t, "nats"))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 { // each kind of call once, all to their ends
		if err := s.call(t.Context(), i); err != nil && i != 4 {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	var before remains
	await(t, time.Minute, "rest", func() bool {
		last := before
		before = s.remains(t, js)
		pause(t.Context(), 500*time.Millisecond)
		return before == last
	})

	cancels := stormCancels(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients errgroup.Group
	var ends map[codes.Code]int
	clients.Go(func() (err error) {
		defer cancel()
		ends, err = s.cancelCalls(t.Context(), cancels)
		return err
	})
	s.breakThings(ctx, t)
	if err := clients.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("calls: %v", ends)
	s.complete(t)

	var after remains
	allowed := before.blobs
	for _, blob := range slices.Concat(s.uploads, s.behind) {
		allowed += int64(len(blob) + 2<<10 + len(blob)/100)
	}
	ended := time.Now()
	more := func() bool {
		after = s.remains(t, js)
		return !after.within(before) || after.blobs > allowed
	}
	left := more()
	for ; left && time.Since(ended) < 90*time.Second; left = more() {
		pause(t.Context(), 500*time.Millisecond)
	}
	if left {
		t.Errorf("%+v are left, before it was %+v, and at most %d bytes of blobs are allowed", after, before, allowed)
		t.Logf("orphans: %v", metric(t, "http://"+s.front.field(t, "http")+"/metrics", "jetfarm_cas_orphaned_uploads_total"))
	}
}
