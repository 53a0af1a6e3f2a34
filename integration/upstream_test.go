package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// startBehind starts an `up` on a folder, with flags of its own.
func startBehind(t testing.TB, name, data string, flags ...string) *process {
	t.Helper()
	args := append([]string{"up", "--data", data, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--concurrency", strconv.Itoa(slots)}, flags...)
	return start(t, name, args...)
}

// soon repeats a call until it says that it is done.
func soon(t testing.TB, what string, done func(ctx context.Context) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done(ctx) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// missing tells whether a farm lacks a blob.
func (c *client) missing(ctx context.Context, d *repb.Digest) bool {
	answer, err := c.blobs.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{d}})
	return err != nil || len(answer.GetMissingBlobDigests()) > 0
}

// A farm with an upstream gives what it was given and what it made to the upstream, gets it back from
// there when it has lost all of its own, and goes on when the upstream dies.
func TestUpstream(t *testing.T) {
	back := startBehind(t, "back", dataDir(t), "--action-cache-updates")
	upstream := "grpc://" + back.field(t, "grpc")
	front := startBehind(t, "front", dataDir(t), "--upstream", upstream)

	blob := random("upstream", 5<<20)
	d := digestOf(blob)
	a := shell(t, "upstream", "echo made; echo made > out", "out")
	c, behind := dial(t, front.field(t, "grpc")), dial(t, back.field(t, "grpc"))
	if err := c.put(t.Context(), a.blobs...); err != nil {
		t.Fatal(err)
	}
	if err := c.write(t.Context(), d, blob); err != nil {
		t.Fatal(err)
	}
	response, err := c.execute(t.Context(), a.digest)
	if err != nil {
		t.Fatal(err)
	}
	if response.GetCachedResult() {
		t.Fatal("a new action has a cached result")
	}
	soon(t, "the blob at the upstream", func(ctx context.Context) bool { return !behind.missing(ctx, d) })
	soon(t, "the result at the upstream", func(ctx context.Context) bool {
		_, err := behind.actions.GetActionResult(ctx, &repb.GetActionResultRequest{ActionDigest: a.digest})
		return err == nil
	})

	front.stop(t)
	front = startBehind(t, "front without data", dataDir(t), "--upstream", upstream)
	c = dial(t, front.field(t, "grpc"))
	if !c.missing(t.Context(), d) {
		t.Error("a farm without data says that a blob of the upstream is present")
	}
	var got bytes.Buffer
	if err := c.read(t.Context(), d, &got); err != nil || !bytes.Equal(got.Bytes(), blob) {
		t.Fatalf("reading through: %d bytes of %d, error %v", got.Len(), len(blob), err)
	}
	soon(t, "a blob that was read through being here", func(ctx context.Context) bool { return !c.missing(ctx, d) })
	response, err = c.execute(t.Context(), a.digest)
	if err != nil {
		t.Fatal(err)
	}
	if !response.GetCachedResult() {
		t.Error("the result of the upstream was not used")
	}
	out := response.GetResult().GetOutputFiles()[0].GetDigest()
	if c.missing(t.Context(), out) {
		t.Error("an output of a result of the upstream is missing")
	}
	if text, err := c.get(t.Context(), out); err != nil || string(text) != "made\n" {
		t.Errorf("the output: %q, error %v", text, err)
	}

	back.kill(t)
	after := shell(t, "upstream is dead", "echo after > out", "out")
	soon(t, "a miss with a dead upstream", func(ctx context.Context) bool {
		err := c.read(ctx, digestOf([]byte("nobody has this")), &bytes.Buffer{})
		if code := status.Code(err); code != codes.NotFound && code != codes.Unavailable {
			t.Fatalf("reading what nobody has: %v", err)
		}
		return status.Code(err) == codes.NotFound
	})
	if err := c.put(t.Context(), after.blobs...); err != nil {
		t.Fatal(err)
	}
	if _, err := c.execute(t.Context(), after.digest); err != nil {
		t.Errorf("executing with a dead upstream: %v", err)
	}
	got.Reset()
	if err := c.read(t.Context(), d, &got); err != nil || !bytes.Equal(got.Bytes(), blob) {
		t.Errorf("reading with a dead upstream: %d bytes of %d, error %v", got.Len(), len(blob), err)
	}
}

// Two farms send each other what gets smaller as zstd, whatever their clients do.
func TestZstdBetweenFarms(t *testing.T) {
	back := startBehind(t, "back", dataDir(t), "--action-cache-updates")
	link := startForwarder(t, back.field(t, "grpc"))
	front := startBehind(t, "front", dataDir(t), "--upstream", "grpc://"+link.addr())
	c, behind := dial(t, front.field(t, "grpc")), dial(t, back.field(t, "grpc"))
	for _, size := range []int{100 << 10, 8 << 20} {
		text := func(of string) []byte { return bytes.Repeat([]byte(of+" is written and read\n"), size/32) }
		given, there := text(fmt.Sprint("given ", size)), text(fmt.Sprint("there ", size))
		before := link.passed.Load()
		if err := c.write(t.Context(), digestOf(given), given); err != nil {
			t.Fatal(err)
		}
		soon(t, "the blob at the upstream", func(ctx context.Context) bool { return !behind.missing(ctx, digestOf(given)) })
		if n := link.passed.Load() - before; n == 0 || n > int64(len(given))*3/4 {
			t.Errorf("to give %d bytes took %d on the wire", len(given), n)
		}
		if err := behind.write(t.Context(), digestOf(there), there); err != nil {
			t.Fatal(err)
		}
		before = link.passed.Load()
		var got bytes.Buffer
		if err := c.read(t.Context(), digestOf(there), &got); err != nil || !bytes.Equal(got.Bytes(), there) {
			t.Errorf("reading through: %d bytes of %d, %v", got.Len(), len(there), err)
		}
		if n := link.passed.Load() - before; n == 0 || n > int64(len(there))*3/4 {
			t.Errorf("to get %d bytes took %d on the wire", len(there), n)
		}
		got.Reset()
		if err := behind.read(t.Context(), digestOf(given), &got); err != nil || !bytes.Equal(got.Bytes(), given) {
			t.Errorf("reading at the upstream: %d bytes of %d, %v", got.Len(), len(given), err)
		}
	}
}
