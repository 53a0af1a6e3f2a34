package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// uploadKills is how often TestBlobsAreWholeAfterKills kills a process. `make soak-kills` raises it.
func uploadKills(t *testing.T) int {
	t.Helper()
	text, set := os.LookupEnv("JETFARM_KILLS")
	if !set {
		return 4
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("JETFARM_KILLS=%q is not a number of kills", text)
	}
	return n
}

// Whatever dies while blobs are being uploaded, each is absent or complete afterwards, and what was
// acknowledged is there.
func TestBlobsAreWholeAfterKills(t *testing.T) {
	f := startSplit(t, 1, 0)
	// What comes back has the address that others know.
	brokerArgs := []string{"broker", "--data", filepath.Join(f.data, "broker"), "--listen", hostPort(t, f.broker.field(t, "nats"))}
	frontendArgs := []string{"frontend", "--nats", f.broker.field(t, "nats"), "--grpc", f.endpoint(t), "--http", "127.0.0.1:0"}
	for round := range uploadKills(t) {
		c := dial(t, f.endpoint(t))
		u := &uploads{run: strconv.FormatUint(rand.Uint64(), 36)}
		ctx, cancel := context.WithCancel(t.Context())
		var clients errgroup.Group
		for n := range 4 {
			clients.Go(func() error { return u.upload(ctx, c, n) })
		}
		pause(ctx, time.Duration(50+rand.IntN(400))*time.Millisecond)
		if round%2 == 0 {
			f.frontends[0].kill(t)
			f.frontends[0] = start(t, "frontend", frontendArgs...)
		} else {
			f.broker.kill(t)
			f.broker = start(t, "broker", brokerArgs...)
		}
		pause(ctx, 100*time.Millisecond)
		cancel()
		if err := clients.Wait(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		t.Run(fmt.Sprintf("WR-29 WR-30 X-43 after kill %d", round), func(t *testing.T) { u.check(t, dial(t, f.endpoint(t))) })
	}
}

// uploads is what the clients of one round have sent.
type uploads struct {
	run string

	mu   sync.Mutex
	sent []sentBlob // guarded by mu
}

type sentBlob struct {
	seed  string
	size  int
	acked bool
}

// upload sends one new blob after the other until ctx ends. Errors that a dying farm may answer with
// are part of the test.
func (u *uploads) upload(ctx context.Context, c *client, n int) error {
	sizes := []int{300, 200 << 10, 3 << 20, 9<<20 + 1}
	for i := 0; ctx.Err() == nil; i++ {
		blob := sentBlob{seed: fmt.Sprint(u.run, n, i), size: sizes[(n+i)%len(sizes)]}
		data := random(blob.seed, blob.size)
		err := c.write(ctx, digestOf(data), data)
		switch status.Code(err) {
		case codes.OK, codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		default:
			return fmt.Errorf("upload of %d bytes: %w", blob.size, err)
		}
		if err != nil {
			pause(ctx, 10*time.Millisecond)
		}
		blob.acked = err == nil
		u.mu.Lock()
		u.sent = append(u.sent, blob)
		u.mu.Unlock()
	}
	return nil
}

// check reads every blob back.
func (u *uploads) check(t *testing.T, c *client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	acked, present := 0, 0
	for _, blob := range u.sent {
		want := random(blob.seed, blob.size)
		d := digestOf(want)
		var promised bool
		var got bytes.Buffer
		err := untilAvailable(ctx, func() error {
			missing, err := c.blobs.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{d}})
			promised = len(missing.GetMissingBlobDigests()) == 0
			if err != nil {
				return err
			}
			got.Reset()
			return c.read(ctx, d, &got)
		})
		switch {
		case err == nil && !bytes.Equal(got.Bytes(), want):
			t.Errorf("blob %v came back with other bytes", d)
		case err != nil && status.Code(err) != codes.NotFound:
			t.Errorf("blob %v, acknowledged %v: %v", d, blob.acked, err)
		case err != nil && (promised || blob.acked):
			t.Errorf("blob %v, acknowledged %v, promised %v, is lost: %v", d, blob.acked, promised, err)
		}
		if blob.acked {
			acked++
		}
		if err == nil {
			present++
		}
	}
	t.Logf("%d uploads, %d acknowledged, %d complete afterwards", len(u.sent), acked, present)
}

// untilAvailable repeats what fails with UNAVAILABLE, as clients do.
func untilAvailable(ctx context.Context, call func() error) error {
	for {
		err := call()
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// Clients that go away in the middle of whatever they do leave nothing behind: no goroutine, no
// subscription and no file.
func TestCancelledTransfersLeaveNothing(t *testing.T) {
	const cancels = 200
	f := startUp(t)
	c := dial(t, f.endpoint(t))
	blob := random("cancelled transfers", 24<<20)
	if err := c.write(t.Context(), digestOf(blob), blob); err != nil {
		t.Fatal(err)
	}
	small := make([][]byte, 200)
	for i := range small {
		small[i] = random(fmt.Sprint("cancelled transfers ", i), 8<<10)
	}
	if err := c.put(t.Context(), small...); err != nil {
		t.Fatal(err)
	}
	transfer := func(ctx context.Context, i int) error {
		switch i % 4 {
		case 0:
			fresh := random(fmt.Sprint("cancelled upload ", i), 6<<20)
			return c.write(ctx, digestOf(fresh), fresh)
		case 1:
			return c.read(ctx, digestOf(blob), io.Discard)
		case 2:
			request := &repb.BatchReadBlobsRequest{}
			for _, s := range small {
				request.Digests = append(request.Digests, digestOf(s))
			}
			_, err := c.blobs.BatchReadBlobs(ctx, request)
			return err
		default:
			return c.put(ctx, random(fmt.Sprint("cancelled batch ", i), 1<<20), random(fmt.Sprint("cancelled batch too ", i), 100))
		}
	}
	if err := transfer(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	before := goroutines(t, f.up)
	var clients errgroup.Group
	clients.SetLimit(8)
	for i := range cancels {
		clients.Go(func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(60))*time.Millisecond)
			defer cancel()
			switch err := transfer(ctx, i); status.Code(err) {
			case codes.OK, codes.Canceled, codes.DeadlineExceeded:
				return nil
			default:
				return fmt.Errorf("transfer %d: %w", i, err)
			}
		})
	}
	if err := clients.Wait(); err != nil {
		t.Fatal(err)
	}
	await(t, 30*time.Second, "end of every goroutine that served a cancelled call", func() bool {
		return goroutines(t, f.up) <= before
	})
	var got bytes.Buffer
	if err := c.read(t.Context(), digestOf(blob), &got); err != nil || !bytes.Equal(got.Bytes(), blob) {
		t.Errorf("reading the blob again: %v, equal %v", err, bytes.Equal(got.Bytes(), blob))
	}
}

// pause returns after d or when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// hostPort returns the address in a URL.
func hostPort(t testing.TB, address string) string {
	t.Helper()
	parsed, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	return parsed.Host
}
