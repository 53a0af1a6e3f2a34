package integration_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Every action of a burst ends once and well.
func TestManyActionsAtOnce(t *testing.T) {
	const actions = 500
	f := startSplit(t, 1, 2)
	c := dial(t, f.endpoint(t))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	var burst errgroup.Group
	for i := range actions {
		a := newAction(t, fmt.Sprint("burst ", i), &repb.Directory{}, &repb.Command{Arguments: []string{"/bin/true"}})
		burst.Go(func() error {
			if err := c.put(ctx, a.blobs...); err != nil {
				return err
			}
			response, err := c.execute(ctx, a.digest)
			if err != nil {
				return err
			}
			return checkRan(response)
		})
	}
	if err := burst.Wait(); err != nil {
		t.Error(err)
	}
}

// Equal actions in flight are one.
func TestEqualActionsRunOnce(t *testing.T) {
	const clients = 50
	f := startSplit(t, 1, 2)
	a := shell(t, "equal", "echo $$ > out; sleep 1; cat /proc/sys/kernel/random/uuid >> out", "out")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	var mu sync.Mutex // guards outputs
	outputs := map[string]int{}
	var all errgroup.Group
	for range clients {
		c := dial(t, f.endpoint(t))
		all.Go(func() error {
			if err := c.put(ctx, a.blobs...); err != nil {
				return err
			}
			response, err := c.execute(ctx, a.digest)
			if err != nil {
				return err
			}
			if err := checkRan(response); err != nil {
				return err
			}
			files := response.GetResult().GetOutputFiles()
			if len(files) != 1 {
				return fmt.Errorf("%d output files, want 1", len(files))
			}
			mu.Lock()
			defer mu.Unlock()
			outputs[files[0].GetDigest().GetHash()]++
			return nil
		})
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(outputs) != 1 {
		t.Errorf("%d clients got %d different results, want one", clients, len(outputs))
	}
}

// What a client leaves behind by vanishing is nothing: the frontend's stacks are the proof.
func TestVanishedClientsLeaveNothing(t *testing.T) {
	const clients, actions = 1000, 20
	f := startSplit(t, 1, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	// The streams are opened over few connections; what vanishes are the connections.
	var conns []*client
	for range actions {
		conns = append(conns, dial(t, f.endpoint(t)))
	}
	var opened errgroup.Group
	for i := range clients {
		c, a := conns[i%actions], shell(t, fmt.Sprint("vanish ", i%actions), "sleep 2")
		opened.Go(func() error {
			if err := c.put(ctx, a.blobs...); err != nil {
				return err
			}
			stream, err := c.runs.Execute(ctx, &repb.ExecuteRequest{ActionDigest: a.digest})
			if err != nil {
				return err
			}
			if _, err := stream.Recv(); err != nil {
				return fmt.Errorf("first update: %w", err)
			}
			return nil
		})
	}
	if err := opened.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, c := range conns {
		c.close()
	}
	// All actions end within this time; nobody is there to be told.
	frontend := f.frontends[0]
	await(t, time.Minute, "return of the frontend's goroutines to what they were", func() bool {
		return goroutines(t, frontend) < 150
	})
	dump := stacks(t, frontend)
	for _, call := range []string{"Execute", "Watch"} {
		if n := strings.Count(dump, "."+call+"("); n > 0 {
			t.Errorf("%d goroutines of the frontend are in %s", n, call)
		}
	}
}

// A blob under a wrong digest is refused on every way in and is nowhere to be seen.
func TestWrongDigestIsNeverVisible(t *testing.T) {
	c := dial(t, startUp(t).endpoint(t))
	for _, size := range []int{1 << 10, 2 << 20} {
		blob := random("honest", size)
		wrong := digestOf(random("claimed", size))
		if err := c.write(t.Context(), wrong, blob); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ByteStream.Write of %d bytes under a wrong digest: %v, want INVALID_ARGUMENT", size, err)
		}
		response, err := c.blobs.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{
			Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: wrong, Data: blob}},
		})
		if err != nil || codes.Code(response.GetResponses()[0].GetStatus().GetCode()) != codes.InvalidArgument {
			t.Errorf("BatchUpdateBlobs of %d bytes under a wrong digest: %v, %v, want INVALID_ARGUMENT", size, response, err)
		}
		missing, err := c.blobs.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: []*repb.Digest{wrong}})
		if err != nil || len(missing.GetMissingBlobDigests()) != 1 {
			t.Errorf("FindMissingBlobs = %v, %v, want the digest of the refused blob", missing, err)
		}
		if err := c.read(t.Context(), wrong, io.Discard); status.Code(err) != codes.NotFound {
			t.Errorf("read of the refused blob: %v, want NOT_FOUND", err)
		}
	}
}

// An action that does what it can to its input changes no byte that another action gets.
func TestActionCannotChangeItsInputs(t *testing.T) {
	c := dial(t, startUp(t).endpoint(t))
	input := []byte("what the client sent\n")
	root := &repb.Directory{Files: []*repb.FileNode{{Name: "input", Digest: digestOf(input)}}}
	hostile := newAction(t, "hostile", root, &repb.Command{Arguments: []string{"/bin/sh", "-c", `
		chmod 0777 input; echo changed > input; echo appended >> input; truncate -s 0 input
		mv input moved; echo changed >> moved; ln moved linked; echo changed >> linked; exit 0`}})
	honest := newAction(t, "honest", root, &repb.Command{Arguments: []string{"/bin/cat", "input"}})
	for _, a := range []*action{hostile, honest} {
		if err := c.put(t.Context(), append(a.blobs, input)...); err != nil {
			t.Fatal(err)
		}
		response, err := c.execute(t.Context(), a.digest)
		if err != nil {
			t.Fatal(err)
		}
		if err := checkRan(response); err != nil {
			t.Fatal(err)
		}
		if a != honest {
			continue
		}
		out := response.GetResult().GetStdoutRaw()
		if len(out) == 0 {
			if out, err = c.get(t.Context(), response.GetResult().GetStdoutDigest()); err != nil {
				t.Fatal(err)
			}
		}
		if string(out) != string(input) {
			t.Errorf("the next action read %q, want %q", out, input)
		}
	}
}

// checkRan returns an error unless the action ran, now, and succeeded.
func checkRan(response *repb.ExecuteResponse) error {
	switch {
	case response.GetStatus().GetCode() != 0:
		return fmt.Errorf("status %v (%s)", response.GetStatus(), response.GetMessage())
	case response.GetResult() == nil:
		return errors.New("no result")
	case response.GetResult().GetExitCode() != 0:
		return fmt.Errorf("exit code %d, standard error %q", response.GetResult().GetExitCode(), response.GetResult().GetStderrRaw())
	}
	return nil
}

// goroutines reads the number of goroutines from the metrics of a role.
func goroutines(t testing.TB, p *process) int {
	t.Helper()
	var n int
	for line := range strings.Lines(httpGet(t, "http://"+p.field(t, "http")+"/metrics")) {
		if _, err := fmt.Sscanf(line, "go_goroutines %d", &n); err == nil {
			return n
		}
	}
	t.Fatalf("%s has no metric go_goroutines", p.name)
	return 0
}

func httpGet(t testing.TB, url string) string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 16<<20))
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s\n%s", url, response.Status, body)
	}
	return string(body)
}

// stacks ends a role the hard way and returns the stacks of all its goroutines.
func stacks(t testing.TB, p *process) string {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	p.dumped = true
	return p.log.tail(1 << 20)
}
