package integration_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/integration/history"
)

const (
	// patience is how long a client hears nothing before it tries another frontend.
	patience = time.Minute
	// retryAfter is how long a client waits before it repeats a call.
	retryAfter = 200 * time.Millisecond
)

// chaosLoad is what build tools ask of a farm that is being broken.
type chaosLoad struct {
	clients int
	// least is how many actions are asked for; more if the faults take longer.
	least int64
	// over says that the faults are.
	over atomic.Bool

	runs      string // the file in which each run of an action leaves its name
	endpoints []string
	history   *history.History
	began     atomic.Int64
	ended     atomic.Int64
}

// run asks for actions until there were enough, each client for one after the other.
func (l *chaosLoad) run(ctx context.Context, t *testing.T) error {
	var all errgroup.Group
	for i := range l.clients {
		c := l.client(t, i)
		all.Go(func() error {
			for ctx.Err() == nil {
				n := l.began.Add(1)
				if n > l.least && l.over.Load() {
					return nil
				}
				c.askFor(ctx, t, n)
				l.ended.Add(1)
			}
			return context.Cause(ctx)
		})
	}
	return all.Wait()
}

// A chaosClient uses one frontend until that fails, and then the next.
type chaosClient struct {
	load  *chaosLoad
	name  string
	conns []*client
	at    atomic.Int64
}

func (l *chaosLoad) client(t *testing.T, i int) *chaosClient {
	t.Helper()
	c := &chaosClient{load: l, name: fmt.Sprint("client ", i)}
	for _, endpoint := range l.endpoints {
		c.conns = append(c.conns, dial(t, endpoint))
	}
	c.at.Store(int64(i))
	return c
}

func (c *chaosClient) conn() *client { return c.conns[int(c.at.Load())%len(c.conns)] }

// askFor has the n-th action executed, by two waiters now and then.
func (c *chaosClient) askFor(ctx context.Context, t *testing.T, n int64) {
	name := fmt.Sprintf("s%d", n)
	script := fmt.Sprintf("echo %s >> %s; echo %s > out", name, c.load.runs, name)
	switch {
	case n%50 == 0:
		script += "; sleep 4"
	case n%10 == 0:
		script += "; sleep 1"
	case n%25 == 1:
		script += "; head -c 700000 /dev/urandom > large"
	}
	a := shell(t, c.load.runs+name, script, "out", "large")
	waiters := 1
	if n%8 == 0 {
		waiters = 2
	}
	var all errgroup.Group
	for i := range waiters {
		ask := c.load.history.Ask(fmt.Sprintf("%s, waiter %d", c.name, i), name)
		all.Go(func() error { return c.pursue(ctx, ask, a) })
	}
	_ = all.Wait() //nolint:errcheck // the history has what went wrong
}

// pursue does what it takes to have an action executed, as build tools do: it repeats what may be repeated,
// and waits for an operation that it has heard of.
func (c *chaosClient) pursue(ctx context.Context, ask *history.Ask, a *action) error {
	if err := c.upload(ctx, a); err != nil {
		ask.Failed = fmt.Sprint("upload: ", err)
		return err
	}
	operation := ""
	for ; ctx.Err() == nil; pause(ctx, retryAfter) {
		s := &history.Stream{Waited: operation}
		ask.Streams = append(ask.Streams, s)
		c.follow(ctx, s, a.digest)
		if n := len(s.Messages); n > 0 {
			operation = s.Messages[n-1].Operation
			if response := s.Messages[n-1].Response; response != nil {
				if !history.Retryable(codes.Code(response.GetStatus().GetCode())) {
					return nil
				}
				operation = ""
			}
		}
		switch {
		case s.GaveUp, history.Retryable(s.End):
			c.at.Add(1)
		case s.End == codes.NotFound && s.Waited != "":
			operation = ""
		case s.End != codes.OK:
			return status.Error(s.End, "not repeated")
		}
	}
	return context.Cause(ctx)
}

// follow makes one call and writes down all that comes of it.
func (c *chaosClient) follow(ctx context.Context, s *history.Stream, action *repb.Digest) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(patience, cancel)
	defer silence.Stop()
	var stream grpc.ServerStreamingClient[longrunningpb.Operation]
	var err error
	if s.Waited == "" {
		stream, err = c.conn().runs.Execute(ctx, &repb.ExecuteRequest{ActionDigest: action})
	} else {
		stream, err = c.conn().runs.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: s.Waited})
	}
	for err == nil {
		var op *longrunningpb.Operation
		if op, err = stream.Recv(); err != nil {
			break
		}
		silence.Reset(patience)
		var m history.Message
		m, err = history.MessageOf(op)
		s.Messages = append(s.Messages, m)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	s.End, s.GaveUp = status.Code(err), ctx.Err() != nil && err != nil
}

// upload sends the blobs of an action, and again while that may be.
func (c *chaosClient) upload(ctx context.Context, a *action) error {
	for {
		call, cancel := context.WithTimeout(ctx, patience)
		err := c.conn().put(call, a.blobs...)
		silent := call.Err() != nil
		cancel()
		if err == nil || ctx.Err() != nil || !silent && !history.Retryable(status.Code(err)) {
			return err
		}
		c.at.Add(1)
		pause(ctx, retryAfter)
	}
}
