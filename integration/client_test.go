package integration_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"testing"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// writeChunk is how much of a blob one message of a ByteStream write carries.
const writeChunk = 512 << 10

// A client speaks REAPI to a farm the way a build tool does.
type client struct {
	conn    *grpc.ClientConn
	blobs   repb.ContentAddressableStorageClient
	actions repb.ActionCacheClient
	runs    repb.ExecutionClient
	streams bytestream.ByteStreamClient
}

func dial(t testing.TB, endpoint string) *client {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	c := &client{
		conn: conn, blobs: repb.NewContentAddressableStorageClient(conn), actions: repb.NewActionCacheClient(conn),
		runs: repb.NewExecutionClient(conn), streams: bytestream.NewByteStreamClient(conn),
	}
	t.Cleanup(c.close)
	return c
}

func (c *client) close() { _ = c.conn.Close() }

func digestOf(blob []byte) *repb.Digest {
	hash := sha256.Sum256(blob)
	return &repb.Digest{Hash: hex.EncodeToString(hash[:]), SizeBytes: int64(len(blob))}
}

// put uploads blobs, all in one request.
func (c *client) put(ctx context.Context, blobs ...[]byte) error {
	request := &repb.BatchUpdateBlobsRequest{}
	for _, blob := range blobs {
		request.Requests = append(request.Requests, &repb.BatchUpdateBlobsRequest_Request{Digest: digestOf(blob), Data: blob})
	}
	response, err := c.blobs.BatchUpdateBlobs(ctx, request)
	if err != nil {
		return err
	}
	for _, r := range response.GetResponses() {
		if r.GetStatus().GetCode() != 0 {
			return fmt.Errorf("upload %v: %w", r.GetDigest(), status.ErrorProto(r.GetStatus()))
		}
	}
	return nil
}

// get downloads a small blob.
func (c *client) get(ctx context.Context, d *repb.Digest) ([]byte, error) {
	response, err := c.blobs.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{d}})
	if err != nil {
		return nil, err
	}
	r := response.GetResponses()[0]
	if r.GetStatus().GetCode() != 0 {
		return nil, fmt.Errorf("download %v: %v", d, r.GetStatus())
	}
	return r.GetData(), nil
}

// write uploads a blob of any size under a digest, which may be wrong.
func (c *client) write(ctx context.Context, d *repb.Digest, blob []byte) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.streams.Write(ctx)
	if err != nil {
		return err
	}
	request := &bytestream.WriteRequest{ResourceName: fmt.Sprintf(
		"uploads/8a9f5d7c-7a51-4c0e-9d0f-%012x/blobs/%s/%d", len(blob), d.GetHash(), d.GetSizeBytes(),
	)}
	for rest := blob; ; {
		n := min(len(rest), writeChunk)
		request.Data, rest = rest[:n], rest[n:]
		request.FinishWrite = len(rest) == 0
		if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			return err
		} else if err != nil || request.GetFinishWrite() {
			break // the verdict comes with the answer
		}
		request = &bytestream.WriteRequest{WriteOffset: int64(len(blob) - len(rest))}
	}
	response, err := stream.CloseAndRecv()
	if err == nil && response.GetCommittedSize() != d.GetSizeBytes() {
		return fmt.Errorf("committed size %d, want %d", response.GetCommittedSize(), d.GetSizeBytes())
	}
	return err
}

// read downloads a blob of any size into w.
func (c *client) read(ctx context.Context, d *repb.Digest, w io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.streams.Read(ctx, &bytestream.ReadRequest{
		ResourceName: fmt.Sprintf("blobs/%s/%d", d.GetHash(), d.GetSizeBytes()),
	})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write(response.GetData()); err != nil {
			return err
		}
	}
}

// An action is what a client asks a farm to run, with the blobs that it consists of.
type action struct {
	digest *repb.Digest
	blobs  [][]byte
}

// newAction returns the action of a command. Actions with different salts are different actions.
func newAction(t testing.TB, salt string, root *repb.Directory, command *repb.Command) *action {
	t.Helper()
	a := &action{}
	add := func(m proto.Message) *repb.Digest {
		blob, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		a.blobs = append(a.blobs, blob)
		return digestOf(blob)
	}
	a.digest = add(&repb.Action{CommandDigest: add(command), InputRootDigest: add(root), Salt: []byte(salt)})
	return a
}

// shell returns the action of a shell script without inputs.
func shell(t testing.TB, salt, script string, outputs ...string) *action {
	t.Helper()
	return newAction(t, salt, &repb.Directory{}, &repb.Command{
		Arguments: []string{"/bin/sh", "-c", script}, OutputPaths: outputs,
	})
}

// execute runs an uploaded action to its end. Every stream must end with exactly one done operation;
// anything else is an error.
func (c *client) execute(ctx context.Context, action *repb.Digest) (*repb.ExecuteResponse, error) {
	stream, err := c.runs.Execute(ctx, &repb.ExecuteRequest{ActionDigest: action})
	if err != nil {
		return nil, err
	}
	return result(stream)
}

func result(stream grpc.ServerStreamingClient[longrunningpb.Operation]) (*repb.ExecuteResponse, error) {
	var done *longrunningpb.Operation
	for {
		operation, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && done == nil:
			return nil, errors.New("the stream ended without a done operation")
		case errors.Is(err, io.EOF):
			response := &repb.ExecuteResponse{}
			if err := done.GetResponse().UnmarshalTo(response); err != nil {
				return nil, err
			}
			return response, nil
		case err != nil:
			return nil, err
		case done != nil:
			return nil, fmt.Errorf("operation %s went on after it was done", operation.GetName())
		case operation.GetDone():
			done = operation
		}
	}
}

// random returns bytes that differ for each seed and compress badly.
func random(seed string, n int) []byte {
	blob := make([]byte, 0, n+sha256.Size)
	for block := sha256.Sum256([]byte(seed)); len(blob) < n; block = sha256.Sum256(block[:]) {
		blob = append(blob, block[:]...)
	}
	return bytes.Clone(blob[:n])
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
