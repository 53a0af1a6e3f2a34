package frontend_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	grpcgzip "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const findMissing = "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs"

// rawCodec is a codec that sends bytes as they are.
type rawCodec struct{ encoding.CodecV2 }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (rawCodec) Unmarshal(mem.BufferSlice, any) error { return nil }

func (rawCodec) Name() string { return "proto" }

func TestMalformedMessages(t *testing.T) {
	h := start(t)
	field := func(number protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), value)
	}
	var deep []byte
	for range 100_000 {
		deep = protowire.AppendTag(deep, 999, protowire.StartGroupType)
	}
	for what, message := range map[string][]byte{
		"X-162 X-13 an instance name that is not UTF-8": field(1, []byte("\xff\xfe")),
		"X-160 groups without end":                      deep,
		"X-160 bytes that are no message":               []byte("\xff\xff\xff\xff\xff\xff"),
	} {
		t.Run(what, func(t *testing.T) {
			err := h.conn.Invoke(t.Context(), findMissing, message, nil, grpc.ForceCodecV2(rawCodec{}))
			wantCode(t, "FindMissingBlobs", err, codes.Internal)
			stream, err := h.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, "/google.bytestream.ByteStream/Write", grpc.ForceCodecV2(rawCodec{}))
			if err != nil {
				t.Fatalf("NewStream: %v", err)
			}
			if err := stream.SendMsg(message); err != nil {
				t.Fatalf("SendMsg: %v", err)
			}
			if err := stream.RecvMsg(nil); status.Code(err) != codes.Internal && status.Code(err) != codes.InvalidArgument {
				t.Errorf("Write: %v", err)
			}
			if h.missing(t, emptyDigest) {
				t.Error("the next call is wrong")
			}
		})
	}
}

func TestGRPCCompression(t *testing.T) {
	h := start(t)
	data := random(100 << 10)
	d := space.Of(data)
	zipped := grpc.UseCompressor(grpcgzip.Name)
	t.Run("GEN-31 gzip", func(t *testing.T) {
		stream, err := h.bytes.Write(t.Context(), zipped)
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		for _, m := range chunks(uploadName(d), data, 30<<10) {
			if err := stream.Send(m); err != nil {
				t.Fatalf("Send: %v", err)
			}
		}
		if resp, err := stream.CloseAndRecv(); err != nil || resp.GetCommittedSize() != d.Size() {
			t.Fatalf("Write = %v, %v", resp, err)
		}
		down, err := h.bytes.Read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}, zipped)
		if err != nil {
			t.Fatalf("Read: %v", err)
		}
		var got []byte
		for {
			m, err := down.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("Recv: %v", err)
			}
			got = append(got, m.GetData()...)
		}
		if !bytes.Equal(got, data) {
			t.Errorf("Read = %d bytes, want %d", len(got), len(data))
		}
	})
	t.Run("GEN-31 none", func(t *testing.T) {
		if h.missing(t, d) {
			t.Error("the blob is missing")
		}
	})
	t.Run("GEN-31 an encoding that nobody knows", func(t *testing.T) {
		f := h.frames(t)
		f.headers(t, 1, findMissing, "grpc-encoding", "nobody-knows")
		if err := f.WriteData(1, true, []byte{1, 0, 0, 0, 1, 'x'}); err != nil {
			t.Fatalf("WriteData: %v", err)
		}
		if got := f.status(t); got != "12" {
			t.Errorf("grpc-status %q, want 12, UNIMPLEMENTED", got)
		}
	})
	t.Run("X-161 a bomb", func(t *testing.T) {
		_, err := h.cas.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{
			Requests: []*repb.BatchUpdateBlobsRequest_Request{{Data: make([]byte, 40<<20)}},
		}, zipped)
		wantCode(t, "BatchUpdateBlobs", err, codes.ResourceExhausted)
	})
}

// frames is a connection on which a test speaks HTTP/2 by itself.
type frames struct {
	*http2.Framer
	conn net.Conn
}

func (h *harness) frames(t testing.TB) *frames {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", h.address)
	if err != nil {
		t.Fatalf("DialContext: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatalf("SetDeadline: %v", err)
	}
	f := &frames{Framer: http2.NewFramer(conn, conn), conn: conn}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatalf("preface: %v", err)
	}
	if err := f.WriteSettings(); err != nil {
		t.Fatalf("WriteSettings: %v", err)
	}
	return f
}

// headers begins a call on a stream.
func (f *frames) headers(t testing.TB, stream uint32, method string, more ...string) {
	t.Helper()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	fields := append([]string{
		":method", http.MethodPost, ":scheme", "http", ":path", method, ":authority", "farm",
		"content-type", "application/grpc", "te", "trailers",
	}, more...)
	for i := 0; i < len(fields); i += 2 {
		if err := encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			t.Fatalf("WriteField: %v", err)
		}
	}
	if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true}); err != nil {
		t.Fatalf("WriteHeaders: %v", err)
	}
}

// status reads until a call has ended and returns its grpc-status.
func (f *frames) status(t testing.TB) string {
	t.Helper()
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatalf("ReadFrame: %v", err)
		}
		if headers, ok := frame.(*http2.MetaHeadersFrame); ok {
			for _, field := range headers.RegularFields() {
				if field.Name == "grpc-status" {
					return field.Value
				}
			}
		}
	}
}

func TestConnectionsThatMisbehave(t *testing.T) {
	h := start(t)
	t.Run("X-155 a flood of pings", func(t *testing.T) {
		f := h.frames(t)
		answered := 0
		for {
			if err := f.WritePing(false, [8]byte{1}); err != nil {
				t.Fatalf("WritePing: %v", err)
			}
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatalf("ReadFrame: %v", err)
			}
			if ping, ok := frame.(*http2.PingFrame); ok && ping.IsAck() {
				answered++
			}
			if away, ok := frame.(*http2.GoAwayFrame); ok {
				if away.ErrCode != http2.ErrCodeEnhanceYourCalm || answered == 0 {
					t.Errorf("GOAWAY %v after %d pings", away.ErrCode, answered)
				}
				return
			}
		}
	})
	t.Run("X-156 streams that open and reset", func(t *testing.T) {
		f := h.frames(t)
		for i := range uint32(5000) {
			f.headers(t, 2*i+1, "/google.bytestream.ByteStream/Write")
			if err := f.WriteRSTStream(2*i+1, http2.ErrCodeCancel); err != nil {
				break // The server has had enough of this connection.
			}
		}
		if h.missing(t, emptyDigest) {
			t.Error("another client's call is wrong")
		}
		_ = f.conn.Close()
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
	t.Run("X-159 HTTP/1", func(t *testing.T) {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+h.address+"/", nil)
		if err != nil {
			t.Fatalf("NewRequest: %v", err)
		}
		transport := &http.Transport{DisableKeepAlives: true}
		defer transport.CloseIdleConnections()
		if resp, err := transport.RoundTrip(request); err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode < 400 {
				t.Errorf("GET = %v, want no success", resp.Status)
			}
		}
	})
	t.Run("X-159 a method that nobody has", func(t *testing.T) {
		err := h.conn.Invoke(t.Context(), "/google.bytestream.ByteStream/Delete", &repb.Digest{}, &repb.Digest{})
		wantCode(t, "Delete", err, codes.Unimplemented)
		wantCode(t, "none", h.conn.Invoke(t.Context(), "/none/none", &repb.Digest{}, &repb.Digest{}), codes.Unimplemented)
	})
}
