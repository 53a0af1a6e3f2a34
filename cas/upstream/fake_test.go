package upstream_test

import (
	"context"
	"path"
	"slices"
	"sync"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// script is a cache that answers as a test says: what no function is set for is UNIMPLEMENTED.
type script struct {
	repb.UnimplementedCapabilitiesServer
	repb.UnimplementedContentAddressableStorageServer
	repb.UnimplementedActionCacheServer
	bytestream.UnimplementedByteStreamServer

	find      func(*repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error)
	readBatch func(*repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error)
	update    func(*repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error)
	read      func(*bytestream.ReadRequest, bytestream.ByteStream_ReadServer) error
	write     func(bytestream.ByteStream_WriteServer) error
	result    func(*repb.GetActionResultRequest) (*repb.ActionResult, error)
	store     func(*repb.UpdateActionResultRequest) (*repb.ActionResult, error)

	mu           sync.Mutex // guards the rest
	capabilities *repb.CacheCapabilities
	calls        map[string]int
	headers      []metadata.MD
}

// startScript serves a script with capabilities that change may change.
func startScript(t testing.TB, s *script) string {
	t.Helper()
	s.calls = make(map[string]int)
	if s.capabilities == nil {
		s.capabilities = &repb.CacheCapabilities{
			DigestFunctions:               []repb.DigestFunction_Value{repb.DigestFunction_SHA256},
			ActionCacheUpdateCapabilities: &repb.ActionCacheUpdateCapabilities{UpdateEnabled: true},
		}
	}
	server := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			s.note(ctx, info.FullMethod)
			return handler(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			s.note(stream.Context(), info.FullMethod)
			return handler(srv, stream)
		}))
	repb.RegisterCapabilitiesServer(server, s)
	repb.RegisterContentAddressableStorageServer(server, s)
	repb.RegisterActionCacheServer(server, s)
	bytestream.RegisterByteStreamServer(server, s)
	return serve(t, server, server.Stop, nil)
}

func (s *script) note(ctx context.Context, method string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[path.Base(method)]++
	md, _ := metadata.FromIncomingContext(ctx)
	s.headers = append(s.headers, md)
}

// count returns how often a method was called.
func (s *script) count(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// seen returns the headers of every call.
func (s *script) seen() []metadata.MD {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.headers)
}

func (s *script) set(change func(c *repb.CacheCapabilities)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.capabilities)
}

var errUnset = status.Error(codes.Unimplemented, "the test has no answer")

func (s *script) GetCapabilities(context.Context, *repb.GetCapabilitiesRequest) (*repb.ServerCapabilities, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &repb.ServerCapabilities{CacheCapabilities: proto.CloneOf(s.capabilities)}, nil
}

func (s *script) FindMissingBlobs(_ context.Context, req *repb.FindMissingBlobsRequest) (*repb.FindMissingBlobsResponse, error) {
	if s.find == nil {
		return nil, errUnset
	}
	return s.find(req)
}

func (s *script) BatchReadBlobs(_ context.Context, req *repb.BatchReadBlobsRequest) (*repb.BatchReadBlobsResponse, error) {
	if s.readBatch == nil {
		return nil, errUnset
	}
	return s.readBatch(req)
}

func (s *script) BatchUpdateBlobs(_ context.Context, req *repb.BatchUpdateBlobsRequest) (*repb.BatchUpdateBlobsResponse, error) {
	if s.update == nil {
		return nil, errUnset
	}
	return s.update(req)
}

func (s *script) Read(req *bytestream.ReadRequest, stream bytestream.ByteStream_ReadServer) error {
	if s.read == nil {
		return errUnset
	}
	return s.read(req, stream)
}

func (s *script) Write(stream bytestream.ByteStream_WriteServer) error {
	if s.write == nil {
		return errUnset
	}
	return s.write(stream)
}

func (s *script) GetActionResult(_ context.Context, req *repb.GetActionResultRequest) (*repb.ActionResult, error) {
	if s.result == nil {
		return nil, errUnset
	}
	return s.result(req)
}

func (s *script) UpdateActionResult(_ context.Context, req *repb.UpdateActionResultRequest) (*repb.ActionResult, error) {
	if s.store == nil {
		return nil, errUnset
	}
	return s.store(req)
}
