package frontend_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
)

func TestHugeSizes(t *testing.T) {
	h := start(t)
	for _, size := range []int64{64<<30 + 1, 1 << 40, 1 << 62, math.MaxInt64} {
		d := must(space.New(absent().Hash(), size))
		t.Run(fmt.Sprintf("X-5 X-37 a blob of %d bytes", size), func(t *testing.T) {
			if !h.missing(t, d) {
				t.Error("it is present")
			}
			_, err := h.write(t.Context(), &bytestream.WriteRequest{ResourceName: uploadName(d)})
			wantCode(t, "Write", err, codes.InvalidArgument, d.Hash())
			_, err = h.write(t.Context(), &bytestream.WriteRequest{ResourceName: packedName(d)})
			wantCode(t, "Write of zstd", err, codes.InvalidArgument, d.Hash())
			_, err = h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String(), ReadOffset: size - 1})
			wantCode(t, "Read", err, codes.NotFound)
			_, err = h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(d, d, d)})
			wantCode(t, "BatchReadBlobs", err, codes.InvalidArgument, "4063232")
		})
	}
}

func TestManyReaders(t *testing.T) {
	h := start(t)
	data := random(1 << 20)
	d := h.put(t, data)
	t.Run("X-47 a hundred readers of one blob", func(t *testing.T) {
		var g errgroup.Group
		for range 100 {
			g.Go(func() error {
				stream, err := h.bytes.Read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
				if err != nil {
					return err
				}
				for at := 0; ; {
					m, err := stream.Recv()
					if errors.Is(err, io.EOF) && at == len(data) {
						return nil
					}
					if err != nil {
						return fmt.Errorf("after %d bytes: %w", at, err)
					}
					if !bytes.HasPrefix(data[at:], m.GetData()) {
						return fmt.Errorf("other bytes at %d", at)
					}
					at += len(m.GetData())
				}
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
}

// A byte changes where a blob is stored.
func TestDamageAtRest(t *testing.T) {
	h := start(t)
	for _, size := range []int{1000, 2 << 20} {
		t.Run(fmt.Sprintf("FMB-11 RD-13 a blob of %d bytes", size), func(t *testing.T) {
			data := random(size)
			d := h.put(t, data)
			h.damage(t, data)
			got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
			if err == nil || bytes.Equal(got, data) {
				t.Fatalf("Read = %d bytes, %v, want an error", len(got), err)
			}
			eventually(t, "the blob is missing", func() bool { return h.missing(t, d) })
			if resp, err := h.write(t.Context(), chunks(uploadName(d), data, 1<<20)...); err != nil || resp.GetCommittedSize() != d.Size() {
				t.Fatalf("Write = %v, %v", resp, err)
			}
			if got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}); err != nil || !bytes.Equal(got, data) {
				t.Errorf("Read of the new copy = %d bytes, %v", len(got), err)
			}
		})
	}
}

// damage replaces the stored message that begins with these bytes by one with another byte in it.
func (h *harness) damage(t testing.TB, data []byte) {
	t.Helper()
	list := h.js.ListStreams(t.Context())
	for info := range list.Info() {
		if !strings.HasPrefix(info.Config.Name, "OBJ_") {
			continue
		}
		stream, err := h.js.Stream(t.Context(), info.Config.Name)
		if err != nil {
			t.Fatalf("Stream: %v", err)
		}
		for seq := info.State.FirstSeq; seq <= info.State.LastSeq; seq++ {
			m, err := stream.GetMsg(t.Context(), seq)
			if err != nil || len(m.Data) < 500 || !bytes.HasPrefix(data, m.Data) {
				continue
			}
			if err := stream.SecureDeleteMsg(t.Context(), seq); err != nil {
				t.Fatalf("SecureDeleteMsg: %v", err)
			}
			bad := bytes.Clone(m.Data)
			bad[100] ^= 1
			header := nats.Header{}
			for key, values := range m.Header {
				if !strings.HasPrefix(key, "Nats-Expected") {
					header[key] = values
				}
			}
			if _, err := h.js.PublishMsg(t.Context(), &nats.Msg{Subject: m.Subject, Header: header, Data: bad}); err != nil {
				t.Fatalf("PublishMsg: %v", err)
			}
			return
		}
	}
	t.Fatal("the blob is stored nowhere as it is")
}
