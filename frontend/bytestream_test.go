package frontend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func TestReadNames(t *testing.T) {
	h := start(t)
	data := random(7)
	d := h.put(t, data)
	inInstance := must(cas.PutBytes(t.Context(), h.blobs, must(digest.SpaceOf("a/b/c", repb.DigestFunction_SHA256, "")), data))
	for row, ok := range map[string]string{"RD-1 GEN-5 without an instance": d.Blob(), "RD-1 GEN-3 in an instance with slashes": inInstance.String()} {
		t.Run(row, func(t *testing.T) {
			got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: ok})
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("Read(%q) = %d bytes, %v", ok, len(got), err)
			}
		})
	}
	hash := d.Hash()
	for row, names := range map[string][]string{
		"RD-1 no name of a blob":          {"", "/", "blobs", "blobs/", "blobs/" + hash, "blobs/" + hash + "/", "compressed-blobs/" + hash + "/7", "x/" + hash + "/7"},
		"GEN-5 GEN-6 slashes":             {"/blobs/" + hash + "/7", "main//blobs/" + hash + "/7", "main/blobs//" + hash + "/7", "blobs/" + hash + "/7/"},
		"RD-15 X-50 other kinds of names": {"blobs/" + hash + "/7/x", "uploads/" + hash + "/7", uploadName(d), "actionResults/blobs/" + hash + "/7"},
		"RD-20 X-6 sizes": {
			"blobs/" + hash + "/07", "blobs/" + hash + "/+7", "blobs/" + hash + "/0x7", "blobs/" + hash + "/-0", "blobs/" + hash + "/-7",
			"blobs/" + hash + "/7e0", "blobs/" + hash + "/9223372036854775808", "blobs/" + hash + "/ 7",
		},
		"GEN-8 X-1 X-2 X-3 hashes": {
			"blobs/" + strings.ToUpper(hash) + "/7", "blobs/" + hash[1:] + "/7", "blobs/" + hash + "0/7", "blobs/" + strings.Repeat("g", 64) + "/7",
			"blobs/../../../../etc/passwd/7",
		},
		"GEN-18 digest functions": {"blobs/sha256/" + hash + "/7", "blobs/BLAKE3/" + hash + "/7", "blobs/md5/" + hash[:32] + "/7"},
		"GEN-4 X-13 instances":    {"actions/blobs/" + hash + "/7", "../blobs/" + hash + "/7", "a\x00b/blobs/" + hash + "/7"},
	} {
		t.Run(row, func(t *testing.T) {
			for _, bad := range names {
				_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: bad})
				wantCode(t, fmt.Sprintf("Read(%q)", bad), err, codes.InvalidArgument)
			}
		})
	}
}

func TestByteStreamRead(t *testing.T) {
	h := start(t)
	small, large := random(100), random(3<<20+17)
	ds, dl := h.put(t, small), h.put(t, large)
	for _, test := range []struct {
		row           string
		name          digest.Digest
		offset, limit int64
		want          []byte
		code          codes.Code
	}{
		{"whole small", ds, 0, 0, small, codes.OK},
		{"whole large", dl, 0, 0, large, codes.OK},
		{"RD-2 absent", absent(), 0, 0, nil, codes.NotFound},
		{"RD-2 absent, at its end", absent(), 16, 0, nil, codes.NotFound},
		{"RD-3 X-44 before", ds, -1, 0, nil, codes.OutOfRange},
		{"RD-3 after", ds, 101, 0, nil, codes.OutOfRange},
		{"X-44 far after", ds, 1<<63 - 1, 0, nil, codes.OutOfRange},
		{"RD-4 at the end", ds, 100, 0, nil, codes.OK},
		{"RD-4 at the end of a large one", dl, int64(len(large)), 0, nil, codes.OK},
		{"RD-5 limit", ds, 10, 5, small[10:15], codes.OK},
		{"RD-5 limit in a large one", dl, 1<<20 - 3, 1<<20 + 7, large[1<<20-3 : 2<<20+4], codes.OK},
		{"RD-5 limit at a chunk's end", dl, 0, 1 << 20, large[:1<<20], codes.OK},
		{"RD-6 X-45 negative limit", ds, 0, -5, nil, codes.InvalidArgument},
		{"RD-7 limit beyond", ds, 90, 1e9, small[90:], codes.OK},
		{"RD-7 limit to the end", dl, 10, int64(len(large)) - 10, large[10:], codes.OK},
		{"RD-19 offset", dl, 3 << 20, 0, large[3<<20:], codes.OK},
		{"RD-11 GEN-20 empty", emptyDigest, 0, 0, nil, codes.OK},
		{"GEN-21 X-8 impossible", impossibleDigest, 0, 0, nil, codes.NotFound},
		{"GEN-21 empty with a size", emptyWithSize, 0, 0, nil, codes.NotFound},
		{"GEN-9 another size", must(space.New(ds.Hash(), 101)), 0, 0, nil, codes.NotFound},
	} {
		t.Run(test.row, func(t *testing.T) {
			got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: test.name.String(), ReadOffset: test.offset, ReadLimit: test.limit})
			wantCode(t, "Read", err, test.code)
			if !bytes.Equal(got, test.want) {
				t.Errorf("Read = %d bytes, want %d, or their content differs", len(got), len(test.want))
			}
		})
	}
}

func TestRD_14_MessagesAreSmall(t *testing.T) {
	h := start(t)
	d := h.put(t, random(5<<20))
	stream, err := h.bytes.Read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
	if err != nil {
		t.Fatalf("Read: %v", err)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("Recv: %v", err)
		}
		if n := len(m.GetData()); n == 0 || n > 1<<20 {
			t.Errorf("a message with %d bytes, want 1 to 1 MiB", n)
		}
	}
}

func TestRD_13_X_49_DamagedBlob(t *testing.T) {
	h := start(t, faulty(damaged))
	d := h.put(t, random(100))
	got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
	wantCode(t, "Read", err, codes.DataLoss)
	if len(got) >= 100 {
		t.Errorf("%d bytes of a damaged blob, want fewer than it has", len(got))
	}
}

func TestGEN_25_X_16_ResourceNameHeader(t *testing.T) {
	h := start(t)
	d, other := h.put(t, random(10)), h.put(t, random(10))
	const header = "build.bazel.remote.execution.v2.resource-name"
	same := metadata.AppendToOutgoingContext(t.Context(), header, d.String())
	differs := metadata.AppendToOutgoingContext(t.Context(), header, other.String())
	if _, err := h.read(same, &bytestream.ReadRequest{ResourceName: d.String()}); err != nil {
		t.Errorf("Read with its own name in the header: %v", err)
	}
	_, err := h.read(differs, &bytestream.ReadRequest{ResourceName: d.String()})
	wantCode(t, "Read with another name in the header", err, codes.InvalidArgument, header)
	_, err = h.write(differs, chunks(uploadName(d), nil, 1)...)
	wantCode(t, "Write with another name in the header", err, codes.InvalidArgument, header)
	_, err = h.bytes.QueryWriteStatus(differs, &bytestream.QueryWriteStatusRequest{ResourceName: uploadName(d)})
	wantCode(t, "QueryWriteStatus with another name in the header", err, codes.InvalidArgument, header)
}

// Audit rows 6 and 13: a reader that leaves midway, a hundred times.
func TestX_48_ReadersLeave(t *testing.T) {
	h := start(t)
	d := h.put(t, random(4<<20))
	h.warm(t)
	subscriptions := h.farm.Subscriptions(t, "")
	consumers := h.consumers(t)
	for range 100 {
		ctx, cancel := context.WithCancelCause(t.Context())
		stream, err := h.bytes.Read(ctx, &bytestream.ReadRequest{ResourceName: d.String()})
		if err != nil {
			t.Fatalf("Read: %v", err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatalf("Recv: %v", err)
		}
		cancel(errors.New("enough"))
	}
	within(t, "the end of the handlers", func() {
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
	eventually(t, "no subscription left", func() bool { return h.farm.Subscriptions(t, "") <= subscriptions })
	if got := h.consumers(t); got != consumers {
		t.Errorf("%d consumers, want %d as before", got, consumers)
	}
}

// warm makes the NATS connections open the subscription that they keep for the answers to requests.
func (h *harness) warm(t testing.TB) {
	t.Helper()
	h.consumers(t)
	for _, size := range []int{10, 2 << 20} {
		d := h.put(t, random(size))
		if _, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}); err != nil {
			t.Fatalf("Read: %v", err)
		}
	}
	if err := h.broker.Ready(t.Context()); err != nil {
		t.Fatalf("Ready: %v", err)
	}
}

// consumers counts the JetStream consumers of all streams.
func (h *harness) consumers(t testing.TB) int {
	t.Helper()
	n := 0
	list := h.js.ListStreams(t.Context())
	for info := range list.Info() {
		n += info.State.Consumers
	}
	if list.Err() != nil {
		t.Fatalf("ListStreams: %v", list.Err())
	}
	return n
}

// bytesStored sums the bytes of all streams.
func (h *harness) bytesStored(t testing.TB) uint64 {
	t.Helper()
	n := uint64(0)
	list := h.js.ListStreams(t.Context())
	for info := range list.Info() {
		n += info.State.Bytes
	}
	if list.Err() != nil {
		t.Fatalf("ListStreams: %v", list.Err())
	}
	return n
}
