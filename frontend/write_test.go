package frontend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

func TestWriteNames(t *testing.T) {
	h := start(t)
	id := uuid.NewString()
	for row, format := range map[string]string{
		"WR-1 without an instance":            "uploads/" + id + "/%s",
		"WR-1 GEN-3 an instance with slashes": "a/b/c/uploads/" + id + "/%s",
		"WR-4 an id in upper case":            "uploads/" + strings.ToUpper(id) + "/%s",
		"WR-2 metadata":                       "uploads/" + id + "/%s/foo/bar.txt",
	} {
		t.Run(row, func(t *testing.T) {
			data := random(9)
			resp, err := h.write(t.Context(), chunks(fmt.Sprintf(format, space.Of(data).Blob()), data, 4)...)
			if err != nil || resp.GetCommittedSize() != 9 {
				t.Errorf("Write(%q) = %v, %v, want 9 bytes", format, resp, err)
			}
		})
	}
	for row, formats := range map[string][]string{
		"WR-1 QWS-6 no name of an upload": {"%s", "/uploads/" + id + "/%s", "uploads/" + id + "/x/%s", "uploads/" + id, "a//uploads/" + id + "/%s", "actions/uploads/" + id + "/%s"},
		"WR-4 X-22 no id":                 {"uploads/%s", "uploads//%s", "uploads/not-a-uuid/%s", "uploads/" + strings.Repeat("1", 10_000) + "/%s", "uploads/{" + id + "}/%s"},
	} {
		t.Run(row, func(t *testing.T) {
			for _, format := range formats {
				data := random(9)
				name := strings.ReplaceAll(format, "%s", space.Of(data).Blob())
				_, err := h.write(t.Context(), chunks(name, data, 4)...)
				wantCode(t, fmt.Sprintf("Write(%.100q)", name), err, codes.InvalidArgument)
				_, err = h.bytes.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name})
				wantCode(t, fmt.Sprintf("QueryWriteStatus(%.100q)", name), err, codes.InvalidArgument)
			}
		})
	}
}

func TestByteStreamWrite(t *testing.T) {
	h := start(t)
	type messages = []*bytestream.WriteRequest
	ten := func() (string, []byte) { b := random(10); return uploadName(space.Of(b)), b }
	for _, test := range []struct {
		row  string
		make func() messages
		code codes.Code
		size int64
	}{
		{"WR-20 in parts", func() messages { n, b := ten(); return chunks(n, b, 3) }, codes.OK, 10},
		{"WR-20 large", func() messages { b := random(3<<20 + 5); return chunks(uploadName(space.Of(b)), b, 1<<20) }, codes.OK, 3<<20 + 5},
		{"WR-31 one large message", func() messages { b := random(4<<20 + 1024); return chunks(uploadName(space.Of(b)), b, 8<<20) }, codes.OK, 4<<20 + 1024},
		{"WR-5 X-19 no name", func() messages { _, b := ten(); return chunks("", b, 3) }, codes.InvalidArgument, 0},
		{"X-21 no message", func() messages { return nil }, codes.InvalidArgument, 0},
		{"WR-6 same name again", func() messages { n, b := ten(); m := chunks(n, b, 5); m[1].ResourceName = n; return m }, codes.OK, 10},
		{"WR-6 X-20 other name", func() messages { n, b := ten(); m := chunks(n, b, 5); m[1].ResourceName, _ = ten(); return m }, codes.InvalidArgument, 0},
		{"WR-7 begins in the middle", func() messages { n, b := ten(); m := chunks(n, b, 5); m[1].ResourceName = n; return m[1:] }, codes.InvalidArgument, 0},
		{"WR-8 X-23 gap", func() messages { n, b := ten(); m := chunks(n, b, 5); m[1].WriteOffset++; return m }, codes.InvalidArgument, 0},
		{"WR-8 overlap", func() messages { n, b := ten(); m := chunks(n, b, 5); m[1].WriteOffset--; return m }, codes.InvalidArgument, 0},
		{"X-23 negative", func() messages { n, b := ten(); m := chunks(n, b, 5); m[0].WriteOffset = -1; return m }, codes.InvalidArgument, 0},
		{"WR-13 X-24 too long", func() messages { n, b := ten(); return chunks(n, append(b, 1), 5) }, codes.InvalidArgument, 0},
		{"WR-14 X-25 too short", func() messages { n, b := ten(); return chunks(n, b[:9], 5) }, codes.InvalidArgument, 0},
		{"WR-15 X-26 wrong byte", func() messages { n, b := ten(); b[3] ^= 1; return chunks(n, b, 5) }, codes.InvalidArgument, 0},
		{"WR-15 wrong byte in a large one", func() messages {
			b := random(2 << 20)
			n := uploadName(space.Of(b))
			b[1<<20] ^= 1
			return chunks(n, b, 1<<20)
		}, codes.InvalidArgument, 0},
		{"WR-22 separate finish", func() messages {
			n, b := ten()
			return messages{{ResourceName: n, Data: b}, {WriteOffset: 10, FinishWrite: true}}
		}, codes.OK, 10},
		{"WR-23 empty", func() messages { return chunks(uploadName(emptyDigest), nil, 1) }, codes.OK, 0},
		{"WR-23 empty without finish", func() messages { return messages{{ResourceName: uploadName(emptyDigest)}} }, codes.OK, 0},
		{"WR-24 X-28 half close", func() messages { n, b := ten(); return chunks(n, b, 5)[:1] }, codes.OK, 0},
		{"WR-24 half close with all bytes", func() messages { n, b := ten(); return messages{{ResourceName: n, Data: b}} }, codes.OK, 0},
		{"WR-25 name first, empty data", func() messages {
			n, b := ten()
			return messages{{ResourceName: n}, {}, {Data: b}, {WriteOffset: 10}, {WriteOffset: 10, FinishWrite: true}}
		}, codes.OK, 10},
		{"WR-27 CAP-11 X-37 too large", func() messages {
			return messages{{ResourceName: uploadName(must(space.New(absent().Hash(), 64<<30+1)))}}
		}, codes.InvalidArgument, 0},
		{"GEN-21 X-8 impossible", func() messages { return chunks(uploadName(impossibleDigest), nil, 1) }, codes.InvalidArgument, 0},
		{"GEN-21 empty with a size", func() messages { return chunks(uploadName(emptyWithSize), []byte("12345"), 5) }, codes.InvalidArgument, 0},
	} {
		t.Run(test.row, func(t *testing.T) {
			sent := test.make()
			resp, err := h.write(t.Context(), sent...)
			wantCode(t, "Write", err, test.code)
			if resp.GetCommittedSize() != test.size {
				t.Errorf("committed_size %d, want %d", resp.GetCommittedSize(), test.size)
			}
			w, err := digest.ParseWrite(firstName(sent))
			if err != nil || w.Digest.IsEmpty() {
				return
			}
			if stored := test.code == codes.OK && test.size > 0; h.missing(t, w.Digest) == stored {
				t.Errorf("present %v, want %v", !stored, stored)
			}
			q, err := h.bytes.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: firstName(sent)})
			if err != nil || q.GetCommittedSize() != test.size || q.GetComplete() != (test.size > 0) { // rows QWS-3, QWS-4
				t.Errorf("QueryWriteStatus = %v, %v, want %d bytes", q, err, test.size)
			}
		})
	}
}

func firstName(messages []*bytestream.WriteRequest) string {
	if len(messages) == 0 {
		return ""
	}
	return messages[0].GetResourceName()
}

// Rows WR-17 and WR-7: a present blob is answered while the client's side is open.
func TestWR_17_PresentBlob(t *testing.T) {
	h := start(t)
	data := random(3 << 20)
	d := h.put(t, data)
	for _, offset := range []int64{0, 1 << 20} {
		stream, err := h.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		first := &bytestream.WriteRequest{ResourceName: uploadName(d), WriteOffset: offset, Data: data[offset : offset+10]}
		if err := stream.Send(first); err != nil {
			t.Fatalf("Send: %v", err)
		}
		resp := new(bytestream.WriteResponse)
		if err := stream.RecvMsg(resp); err != nil || resp.GetCommittedSize() != d.Size() {
			t.Errorf("from %d: %v, %v, want committed_size %d at once", offset, resp, err, d.Size())
		}
	}
}

// Row WR-18 and audit row P8: somebody else completes the blob during the upload.
func TestWR_18_AnotherWriterIsFaster(t *testing.T) {
	h := start(t)
	data := random(3 * frontend.PresentEvery)
	d := space.Of(data)
	stream, err := h.bytes.Write(t.Context())
	if err != nil {
		t.Fatalf("Write: %v", err)
	}
	messages := chunks(uploadName(d), data, 1<<20)
	for _, m := range messages[:2] {
		if err := stream.Send(m); err != nil {
			t.Fatalf("Send: %v", err)
		}
	}
	h.put(t, data)
	// The last message is never sent: only an early answer can come.
	for _, m := range messages[2 : len(messages)-1] {
		if stream.Send(m) != nil {
			break
		}
	}
	resp := new(bytestream.WriteResponse)
	if err := stream.RecvMsg(resp); err != nil || resp.GetCommittedSize() != d.Size() {
		t.Errorf("%v, %v, want committed_size %d", resp, err, d.Size())
	}
}

// Rows WR-11 and FMB-8: nothing is visible before finish_write.
func TestWR_11_FMB_8_InvisibleUntilFinished(t *testing.T) {
	h := start(t)
	for _, size := range []int{100, 2 << 20} {
		data := random(size)
		d := space.Of(data)
		stream, err := h.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		if err := stream.Send(&bytestream.WriteRequest{ResourceName: uploadName(d), Data: data}); err != nil {
			t.Fatalf("Send: %v", err)
		}
		if !h.missing(t, d) {
			t.Errorf("%d bytes are present before finish_write", size)
		}
		if err := stream.Send(&bytestream.WriteRequest{WriteOffset: int64(size), FinishWrite: true}); err != nil {
			t.Fatalf("Send of the finish: %v", err)
		}
		if _, err := stream.CloseAndRecv(); err != nil {
			t.Fatalf("CloseAndRecv: %v", err)
		}
		if h.missing(t, d) {
			t.Errorf("%d bytes are missing after the answer", size)
		}
	}
}

// Many writers of one blob, some of them corrupt, in every form, half of them under one upload id.
func TestWR_19_WR_33_X_35_X_36_RacingWriters(t *testing.T) {
	h := start(t)
	data := random(1 << 20)
	d := space.Of(data)
	shared := uploadName(d)
	var g errgroup.Group
	for i := range 24 {
		sent, corrupt := data, i%4 == 3
		if corrupt {
			sent = bytes.Clone(data)
			sent[i] ^= 1
		}
		name, body := shared, sent
		switch i % 3 {
		case 1:
			name = uploadName(d)
		case 2:
			name, body = packedName(d), pack(sent)
		}
		g.Go(func() error {
			for {
				resp, err := h.write(t.Context(), chunks(name, body, 256<<10)...)
				switch {
				case err == nil && (resp.GetCommittedSize() == int64(len(body)) || resp.GetCommittedSize() == -1):
					return nil
				case corrupt && status.Code(err) == codes.InvalidArgument:
					return nil
				case name == shared && status.Code(err) == codes.Unavailable:
					continue // Another one of the same name stopped it.
				}
				return fmt.Errorf("writer %d: %v, %w", i, resp, err)
			}
		})
	}
	g.Go(func() error {
		if got := h.update(t, blob(data)); got[0] != codes.OK {
			return fmt.Errorf("batch: %v", got)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("Read = %d bytes, %v", len(got), err)
	}
}

// Row WR-34: the reason arrives at once, although the client goes on sending.
func TestWR_34_ErrorIsImmediate(t *testing.T) {
	h := start(t)
	data := random(1 << 20)
	name := uploadName(must(space.New(absent().Hash(), 1<<30)))
	within(t, "the refusal", func() {
		stream, err := h.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		for i := int64(0); err == nil; i++ {
			err = stream.Send(&bytestream.WriteRequest{ResourceName: name, WriteOffset: 7 * i, Data: data})
		}
		_, err = stream.CloseAndRecv()
		wantCode(t, "Write", err, codes.InvalidArgument, "write_offset")
	})
}

// Audit row 4: the store fails while the client keeps its stream open.
func TestWR_26_X_38_StoreFails(t *testing.T) {
	failure := atomic.Pointer[castest.Fault]{}
	h := start(t, faulty(func(op castest.Op, _ digest.Digest) castest.Fault {
		if op == castest.OpPut {
			return *failure.Load()
		}
		return castest.Fault{}
	}))
	for _, test := range []struct {
		fault castest.Fault
		code  codes.Code
	}{
		{castest.Fault{After: -1, Err: cas.ErrFull}, codes.ResourceExhausted},
		{castest.Fault{After: 100 << 10, Err: cas.ErrFull}, codes.ResourceExhausted},
		{castest.Fault{After: 100 << 10, Err: cas.ErrUnavailable}, codes.Unavailable},
		{castest.Fault{After: 100 << 10, Err: errors.New("a secret of the store")}, codes.Internal},
	} {
		failure.Store(&test.fault)
		for range 25 {
			data := random(300 << 10)
			stream, err := h.bytes.Write(t.Context())
			if err != nil {
				t.Fatalf("Write: %v", err)
			}
			if err := stream.Send(&bytestream.WriteRequest{ResourceName: uploadName(space.Of(data)), Data: data[:200<<10]}); err != nil {
				t.Fatalf("Send: %v", err)
			}
			within(t, "the answer", func() {
				err := stream.RecvMsg(new(bytestream.WriteResponse))
				wantCode(t, "Write", err, test.code)
				if strings.Contains(err.Error(), "secret") {
					t.Errorf("Write: %v, want no detail of an unknown error", err)
				}
			})
		}
	}
	eventually(t, "no handler left", func() bool { return handlers() == 0 })
}

// Audit rows 4 and 6, rows WR-28 and X-33: clients leave midway.
func TestWR_28_X_33_ClientsLeave(t *testing.T) {
	h := start(t)
	data := random(3 << 20)
	d := space.Of(data)
	h.warm(t)
	subscriptions, consumers := h.farm.Subscriptions(t, ""), h.consumers(t)
	stored := h.bytesStored(t)
	for i := range 100 {
		ctx, cancel := context.WithCancelCause(t.Context())
		stream, err := h.bytes.Write(ctx)
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		for _, m := range chunks(uploadName(d), data, 1<<20)[:i%3] {
			if err := stream.Send(m); err != nil {
				t.Fatalf("Send: %v", err)
			}
		}
		cancel(errors.New("gone"))
	}
	within(t, "the end of the handlers", func() {
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
	eventually(t, "no subscription left", func() bool { return h.farm.Subscriptions(t, "") <= subscriptions })
	if got := h.consumers(t); got != consumers {
		t.Errorf("%d consumers, want %d as before", got, consumers)
	}
	// The store keeps their beginnings for a while, so that they can go on.
	if !h.missing(t, d) {
		t.Error("a blob that nobody finished is present")
	}
	// The next upload is not told that it is done: it transfers everything, and nothing else is left.
	defer func() {
		one := stored + uint64(len(data)) + 100<<10
		eventually(t, "one copy is left", func() bool { return h.bytesStored(t) <= one })
	}()
	if resp, err := h.write(t.Context(), chunks(uploadName(d), data, 1<<20)...); err != nil || resp.GetCommittedSize() != d.Size() {
		t.Errorf("the next upload: %v, %v", resp, err)
	}
}

// The connection itself vanishes in the middle of uploads.
func TestByteStreamWrite_ConnectionDrops(t *testing.T) {
	h := start(t)
	conn := h.dial(t)
	for range 20 {
		stream, err := bytestream.NewByteStreamClient(conn).Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		d := must(space.New(absent().Hash(), 2<<20))
		if err := stream.Send(&bytestream.WriteRequest{ResourceName: uploadName(d), Data: random(1 << 20)}); err != nil {
			t.Fatalf("Send: %v", err)
		}
	}
	eventually(t, "the uploads are being served", func() bool { return handlers() >= 20 })
	_ = conn.Close()
	within(t, "the end of the handlers", func() {
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
}

// Rows, conventions 6.4: neither silence nor empty messages hold a stream.
func TestX_29_StalledUpload(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.Stall, c.Limits.NoData = 200*time.Millisecond, 400*time.Millisecond })
	t.Run("X-29 silence before the first message", func(t *testing.T) {
		stream, err := h.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		within(t, "the end", func() {
			wantCode(t, "Write", stream.RecvMsg(new(bytestream.WriteResponse)), codes.DeadlineExceeded)
		})
	})
	t.Run("X-29 silence in the middle", func(t *testing.T) {
		stream := beginUpload(t, h.bytes, 2<<20, 1<<20)
		within(t, "the end", func() {
			wantCode(t, "Write", stream.RecvMsg(new(bytestream.WriteResponse)), codes.DeadlineExceeded)
		})
	})
	t.Run("X-32 only empty messages", func(t *testing.T) {
		stream := beginUpload(t, h.bytes, 2<<20, 1<<20)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		var err error
		for n := 0; err == nil; n++ {
			if n > 250 {
				t.Fatal("empty messages for 5 s")
			}
			<-tick.C
			err = stream.Send(&bytestream.WriteRequest{WriteOffset: 1 << 20})
		}
		wantCode(t, "Write", stream.RecvMsg(new(bytestream.WriteResponse)), codes.DeadlineExceeded, "empty messages")
	})
	t.Run("slow but alive", func(t *testing.T) {
		data := random(10)
		stream, err := h.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		tick := time.NewTicker(60 * time.Millisecond)
		defer tick.Stop()
		for _, m := range chunks(uploadName(space.Of(data)), data, 1) { // 600 ms in all
			<-tick.C
			if err := stream.Send(m); err != nil {
				t.Fatalf("Send: %v", err)
			}
		}
		if _, err := stream.CloseAndRecv(); err != nil {
			t.Errorf("CloseAndRecv: %v", err)
		}
	})
	eventually(t, "no handler left", func() bool { return handlers() == 0 })
}

// uploadStream is a Write stream.
type uploadStream struct {
	bytestream.ByteStream_WriteClient
}

// beginUpload sends the first bytes of a blob.
func beginUpload(t testing.TB, client bytestream.ByteStreamClient, size, sent int64) uploadStream {
	t.Helper()
	stream, err := client.Write(t.Context())
	if err != nil {
		t.Fatalf("Write: %v", err)
	}
	d := must(space.New(absent().Hash(), size))
	if err := stream.Send(&bytestream.WriteRequest{ResourceName: uploadName(d), Data: random(int(sent))}); err != nil {
		t.Fatalf("Send: %v", err)
	}
	return uploadStream{stream}
}

// Row X-46: a reader that does not read is not waited for.
func TestX_46_StalledReader(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.Stall = 200 * time.Millisecond })
	d := h.put(t, random(8<<20))
	conn := h.dial(t, grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	stream, err := bytestream.NewByteStreamClient(conn).Read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
	if err != nil {
		t.Fatalf("Read: %v", err)
	}
	eventually(t, "the read is being served", func() bool { return handlers() > 0 })
	within(t, "the end of the handler", func() {
		eventually(t, "no handler left", func() bool { return handlers() == 0 })
	})
	for err == nil {
		_, err = stream.Recv()
	}
	if errors.Is(err, io.EOF) {
		t.Error("a reader that stalled got the whole blob")
	}
}
