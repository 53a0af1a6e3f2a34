package frontend_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas/digest"
)

const chunk = 512 << 10 // what the store keeps of an upload is whole chunks

// queried is the answer of QueryWriteStatus.
type queried struct {
	size     int64
	complete bool
}

func (h *harness) query(t testing.TB, name string) queried {
	t.Helper()
	resp, err := h.bytes.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name})
	if err != nil {
		t.Fatalf("QueryWriteStatus: %v", err)
	}
	return queried{resp.GetCommittedSize(), resp.GetComplete()}
}

// breakOff uploads the first n bytes of data and leaves without a word.
func (h *harness) breakOff(t testing.TB, name string, data []byte, n int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := h.bytes.Write(ctx)
	if err != nil {
		t.Fatalf("Write: %v", err)
	}
	if err := stream.Send(&bytestream.WriteRequest{ResourceName: name, Data: data[:n]}); err != nil {
		t.Fatalf("Send: %v", err)
	}
	want := queried{int64(n / chunk * chunk), false}
	eventually(t, fmt.Sprintf("%d bytes are kept", want.size), func() bool { return h.query(t, name) == want })
	cancel()
	eventually(t, "no handler left", func() bool { return handlers() == 0 })
}

// from is the rest of an upload in one message.
func from(name string, data []byte, offset int64) *bytestream.WriteRequest {
	return &bytestream.WriteRequest{ResourceName: name, WriteOffset: offset, Data: data[offset:], FinishWrite: true}
}

// An upload that broke off at one frontend goes on at another.
func TestResumedUploads(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	begin := func(t *testing.T) (name string, data []byte, d digest.Digest) {
		t.Helper()
		data = random(3<<20 + 17)
		d = space.Of(data)
		name = uploadName(d)
		h.breakOff(t, name, data, 1<<20+100)
		if !other.missing(t, d) {
			t.Error("the beginning of a blob is the blob")
		}
		return name, data, d
	}
	whole := func(t *testing.T, d digest.Digest, data []byte) {
		t.Helper()
		for _, frontend := range []*harness{h, other} {
			got, err := frontend.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("Read = %d bytes, %v", len(got), err)
			}
		}
	}
	t.Run("WR-7 QWS-2 QWS-5 at what is kept", func(t *testing.T) {
		name, data, d := begin(t)
		q := other.query(t, name)
		if q != (queried{1 << 20, false}) {
			t.Fatalf("QueryWriteStatus = %v, want 1 MiB", q)
		}
		resp, err := other.write(t.Context(), from(name, data, q.size))
		if err != nil || resp.GetCommittedSize() != d.Size() {
			t.Fatalf("Write = %v, %v", resp, err)
		}
		if q := other.query(t, name); q != (queried{d.Size(), true}) {
			t.Errorf("QueryWriteStatus = %v, want it complete", q)
		}
		whole(t, d, data)
	})
	t.Run("WR-7 elsewhere", func(t *testing.T) {
		name, data, d := begin(t)
		_, err := other.write(t.Context(), from(name, data, 1<<20+1))
		wantCode(t, "beyond what is kept", err, codes.InvalidArgument, "1048576")
		// Before it, another answer of QueryWriteStatus is all that the client needs.
		_, err = other.write(t.Context(), from(name, data, 1<<19))
		if wantCode(t, "before what is kept", err, codes.Aborted, "1048576"); len(status.Convert(err).Details()) != 1 {
			t.Errorf("details %v, want a RetryInfo", status.Convert(err).Details())
		}
		if !other.missing(t, d) {
			t.Error("a refused upload stored the blob")
		}
		if q := other.query(t, name); q != (queried{1 << 20, false}) {
			t.Errorf("QueryWriteStatus = %v, want 1 MiB still", q)
		}
	})
	t.Run("WR-7 QWS-1 from the start, which never takes back what was told", func(t *testing.T) {
		name, data, d := begin(t)
		stream, err := other.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		least := other.query(t, name)
		for _, m := range chunks(name, data, 300_000) {
			if err := stream.Send(m); err != nil {
				t.Fatalf("Send: %v", err)
			}
			q := h.query(t, name)
			if q.size < least.size || least.complete && !q.complete {
				t.Errorf("QueryWriteStatus = %v after %v", q, least)
			}
			least = q
		}
		if resp, err := stream.CloseAndRecv(); err != nil || resp.GetCommittedSize() != d.Size() {
			t.Fatalf("Write = %v, %v", resp, err)
		}
		whole(t, d, data)
	})
	t.Run("WR-15 with other bytes, after which nothing is kept", func(t *testing.T) {
		name, data, d := begin(t)
		data = bytes.Clone(data)
		data[2<<20] ^= 1
		_, err := other.write(t.Context(), from(name, data, 1<<20))
		wantCode(t, "Write", err, codes.InvalidArgument)
		if !other.missing(t, d) {
			t.Error("the blob is present")
		}
		eventually(t, "nothing is kept", func() bool { return other.query(t, name) == queried{} })
	})
	t.Run("WR-3 one upload id for two blobs", func(t *testing.T) {
		name, _, d := begin(t)
		data := random(2 << 20)
		second := name[:len("uploads/")+36] + "/" + space.Of(data).Blob()
		if q := other.query(t, second); q != (queried{}) {
			t.Errorf("QueryWriteStatus = %v of a blob of which nothing came", q)
		}
		if _, err := other.write(t.Context(), from(second, data, 0)); err != nil {
			t.Errorf("Write: %v", err)
		}
		if q := other.query(t, name); q != (queried{1 << 20, false}) || !other.missing(t, d) {
			t.Errorf("QueryWriteStatus = %v of the first", q)
		}
	})
	t.Run("QWS-3 under another id", func(t *testing.T) {
		_, _, d := begin(t)
		if q := other.query(t, uploadName(d)); q != (queried{}) {
			t.Errorf("QueryWriteStatus = %v, want nothing", q)
		}
	})
	t.Run("WR-24 X-28 closed without the end", func(t *testing.T) {
		data := random(3 << 20)
		name := uploadName(space.Of(data))
		resp, err := h.write(t.Context(), &bytestream.WriteRequest{ResourceName: name, Data: data[:3*chunk+5]})
		if err != nil || resp.GetCommittedSize() != 3*chunk {
			t.Errorf("Write = %v, %v, want %d", resp, err, 3*chunk)
		}
		if q := other.query(t, name); q != (queried{3 * chunk, false}) || !other.missing(t, space.Of(data)) {
			t.Errorf("QueryWriteStatus = %v, want %d", q, 3*chunk)
		}
		if _, err := other.write(t.Context(), from(name, data, 3*chunk)); err != nil {
			t.Errorf("Write: %v", err)
		}
		whole(t, space.Of(data), data)
	})
}

// What ends an upload besides its client.
func TestUploadsSurviveConnectionsAndFrontends(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	for what, end := range map[string]func(first *harness){
		"its connection": func(first *harness) { _ = first.conn.Close() },
		"its frontend":   func(first *harness) { first.server.GRPC().Stop() },
	} {
		t.Run("WR-28 QWS-5 when "+what+" dies", func(t *testing.T) {
			first := startOn(t, h.farm)
			data := random(2 << 20)
			name := uploadName(space.Of(data))
			stream, err := first.bytes.Write(t.Context())
			if err != nil {
				t.Fatalf("Write: %v", err)
			}
			if err := stream.Send(&bytestream.WriteRequest{ResourceName: name, Data: data[:chunk+1]}); err != nil {
				t.Fatalf("Send: %v", err)
			}
			eventually(t, "a chunk is kept", func() bool { return other.query(t, name).size == chunk })
			end(first)
			eventually(t, "no handler left", func() bool { return handlers() == 0 })
			if _, err := other.write(t.Context(), from(name, data, chunk)); err != nil {
				t.Fatalf("Write: %v", err)
			}
			got, err := other.read(t.Context(), &bytestream.ReadRequest{ResourceName: space.Of(data).String()})
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("Read = %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestUploadsThatCross(t *testing.T) {
	h := start(t)
	other := startOn(t, h.farm)
	t.Run("WR-33 X-36 two streams of one name", func(t *testing.T) {
		data := random(3 << 20)
		d := space.Of(data)
		name := uploadName(d)
		stream, err := h.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		messages := chunks(name, data, 1<<20)
		if err := stream.Send(messages[0]); err != nil {
			t.Fatalf("Send: %v", err)
		}
		wrong := bytes.Clone(data)
		wrong[len(wrong)-1] ^= 1
		_, err = other.write(t.Context(), chunks(name, wrong, 700_000)...)
		wantCode(t, "the second stream", err, codes.InvalidArgument)
		for _, m := range messages[1:] {
			if err := stream.Send(m); err != nil {
				break
			}
		}
		// It may have been stopped by the other one, but never half.
		resp, err := stream.CloseAndRecv()
		if err != nil {
			wantCode(t, "the first stream", err, codes.Unavailable)
			if !other.missing(t, d) {
				t.Error("an upload that was stopped is present")
			}
			resp, err = h.write(t.Context(), messages...)
		}
		if err != nil || resp.GetCommittedSize() != d.Size() {
			t.Errorf("the first stream: %v, %v", resp, err)
		}
		got, err := other.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("Read = %d bytes, %v", len(got), err)
		}
	})
	t.Run("WR-32 the same upload again", func(t *testing.T) {
		data := random(1000)
		name := uploadName(space.Of(data))
		for range 2 {
			if resp, err := h.write(t.Context(), chunks(name, data, 500)...); err != nil || resp.GetCommittedSize() != 1000 {
				t.Errorf("Write = %v, %v", resp, err)
			}
		}
	})
	for _, size := range []int{1000, 2 << 20} {
		t.Run(fmt.Sprintf("WR-12 X-27 a message after finish_write of %d bytes", size), func(t *testing.T) {
			data := random(size)
			d := space.Of(data)
			stream, err := h.bytes.Write(t.Context())
			if err != nil {
				t.Fatalf("Write: %v", err)
			}
			for _, m := range append(chunks(uploadName(d), data, 1<<20), &bytestream.WriteRequest{WriteOffset: d.Size(), Data: []byte("more")}) {
				if err := stream.Send(m); err != nil {
					break
				}
			}
			if _, err := stream.CloseAndRecv(); err != nil && status.Code(err) != codes.InvalidArgument {
				t.Errorf("Write: %v", err)
			}
			got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("Read = %d bytes, %v", len(got), err)
			}
		})
	}
	t.Run("X-41 QWS-3 a flood of questions", func(t *testing.T) {
		h := start(t) // where nothing that uploads leave behind arrives meanwhile
		h.warm(t)
		stored := h.bytesStored(t)
		for range 1000 {
			if q := h.query(t, uploadName(must(space.New(absent().Hash(), 2<<20)))); q != (queried{}) {
				t.Fatalf("QueryWriteStatus = %v", q)
			}
		}
		if now := h.bytesStored(t); now >= stored+1000 {
			t.Errorf("%d bytes are stored, want %d as before", now, stored)
		}
	})
	t.Run("QWS-4 a blob that is there", func(t *testing.T) {
		d := h.put(t, random(2<<20))
		if q := h.query(t, uploadName(d)); q != (queried{d.Size(), true}) {
			t.Errorf("QueryWriteStatus = %v", q)
		}
	})
}
