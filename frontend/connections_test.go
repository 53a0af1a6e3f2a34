package frontend_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/net/http2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/frontend"
)

// A machine that is switched off closes no connection. The server asks after a while, and without an
// answer ends what the client had begun, while an idle client that answers keeps its connection.
func TestX_34_VanishedClient(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.Silence = 2 * time.Second })
	idle := beginUpload(t, h.bytes, 2<<20, 1<<20)
	f := h.frames(t)
	f.headers(t, 1, "/google.bytestream.ByteStream/Write")
	d := absent()
	message := encode(&bytestream.WriteRequest{ResourceName: uploadName(d), Data: []byte("x")})
	body := append([]byte{0, 0, 0, 0, byte(len(message))}, message...)
	if err := f.WriteData(1, false, body); err != nil {
		t.Fatalf("WriteData: %v", err)
	}
	eventually(t, "both uploads are served", func() bool { return handlers() == 2 })
	// From here on the client is gone: it reads and writes nothing.
	eventually(t, "its upload has ended", func() bool { return handlers() == 1 })
	for i := range 3 { // the connection of the other one is alive, several questions later
		eventually(t, "another question", func() bool { return !h.missing(t, emptyDigest) })
		if err := idle.Send(&bytestream.WriteRequest{WriteOffset: 1<<20 + int64(i), Data: []byte("x")}); err != nil {
			t.Errorf("Send: %v", err)
		}
	}
	if err := f.conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatalf("SetReadDeadline: %v", err)
	}
	if _, err := io.Copy(io.Discard, f.conn); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		t.Errorf("the connection is still open: %v", err)
	}
}

func isTimeout(err error) bool {
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout()
}

// Connections that never get to their first call are closed, and those that are many keep nobody out.
func TestX_157_SlowHandshakes(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.Handshake = 2 * time.Second })
	const connections = 500
	open := make([]net.Conn, connections)
	for i := range open {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", h.address)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer conn.Close()
		if i%2 == 1 {
			if _, err := io.WriteString(conn, http2.ClientPreface[:10]); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
		}
		open[i] = conn
	}
	if _, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: protos(absent())}); err != nil {
		t.Errorf("FindMissingBlobs beside them: %v", err)
	}
	for i, conn := range open {
		if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatalf("SetReadDeadline: %v", err)
		}
		if _, err := io.Copy(io.Discard, conn); isTimeout(err) {
			t.Fatalf("connection %d, which says nothing, is still open", i)
		}
	}
}

// Very many streams wait when the server is shut down: each gets UNAVAILABLE, so that its client goes on
// at another frontend, and the server ends in time.
func TestX_165_X_106_ShutdownWithManyStreams(t *testing.T) {
	const connections, each = 10, 200
	h := start(t)
	op, _ := recv(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: h.action(t).Proto()}))
	var streams []operationStream
	for range connections {
		client := repb.NewExecutionClient(h.dial(t))
		for range each {
			stream, err := client.WaitExecution(t.Context(), &repb.WaitExecutionRequest{Name: op.GetName()})
			if err != nil {
				t.Fatalf("WaitExecution: %v", err)
			}
			streams = append(streams, operationStream{stream})
		}
	}
	for _, stream := range streams {
		recv(t, stream)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	within(t, "Shutdown", func() {
		if err := h.server.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
	for i, stream := range streams {
		var err error
		for err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, fmt.Sprint("stream ", i), err, codes.Unavailable)
	}
	if n := handlers(); n != 0 {
		t.Errorf("%d handlers after Shutdown", n)
	}
}
