package frontend_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nats.go"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// The tests make and read frames with a coder of their own, as clients have it.

func pack(data []byte, options ...zstd.EOption) []byte {
	options = append([]zstd.EOption{zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true)}, options...)
	e := must(zstd.NewWriter(nil, options...))
	defer e.Close()
	return e.EncodeAll(data, nil)
}

// packStream is one frame that does not tell its size, as Bazel sends it.
func packStream(data []byte, options ...zstd.EOption) []byte {
	var out bytes.Buffer
	e := must(zstd.NewWriter(&out, append(options, zstd.WithEncoderConcurrency(1))...))
	must(e.Write(data))
	if err := e.Close(); err != nil {
		panic(err)
	}
	return out.Bytes()
}

// unpack refuses what a client with an 8 MiB window would refuse.
func unpack(frames []byte) ([]byte, error) {
	d := must(zstd.NewReader(nil, zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderConcurrency(1)))
	defer d.Close()
	return d.DecodeAll(frames, nil)
}

// text returns n bytes that compress.
func text(n int) []byte {
	var b bytes.Buffer
	for seed := random(8); b.Len() < n; {
		fmt.Fprintf(&b, "%x line %d\n", seed, b.Len())
	}
	return b.Bytes()[:n]
}

func packedName(d digest.Digest) string {
	return "uploads/" + uuid.NewString() + "/compressed-blobs/zstd/" + d.Blob()[len("blobs/"):]
}

func packedReadName(d digest.Digest) string {
	return "compressed-blobs/zstd/" + d.Blob()[len("blobs/"):]
}

// skippable is a frame that holds nothing of use.
func skippable(n int) []byte {
	return append(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, 0x184D2A50), uint32(n)), make([]byte, n)...)
}

func TestCompressedRead(t *testing.T) {
	h := start(t)
	small, large, noise := text(1000), text(3<<20+17), random(1<<20+5)
	ds, dl, dn := h.put(t, small), h.put(t, large), h.put(t, noise)
	for _, test := range []struct {
		row           string
		d             digest.Digest
		offset, limit int64
		want          []byte
		code          codes.Code
	}{
		{"RD-10 small", ds, 0, 0, small, codes.OK},
		{"RD-10 large", dl, 0, 0, large, codes.OK},
		{"RD-10 what does not compress", dn, 0, 0, noise, codes.OK},
		{"RD-9 offset", ds, 10, 0, small[10:], codes.OK},
		{"RD-9 offset in a large one", dl, 1<<20 + 3, 0, large[1<<20+3:], codes.OK},
		{"RD-9 offset in what does not compress", dn, 600_001, 0, noise[600_001:], codes.OK},
		{"RD-4 at the end", dl, dl.Size(), 0, nil, codes.OK},
		{"RD-3 X-44 before", ds, -1, 0, nil, codes.OutOfRange},
		{"RD-3 X-44 after", ds, 1001, 0, nil, codes.OutOfRange},
		{"RD-8 X-45 limit", ds, 0, 1, nil, codes.InvalidArgument},
		{"RD-8 X-45 negative limit", ds, 0, -1, nil, codes.InvalidArgument},
		{"RD-2 absent", absent(), 0, 0, nil, codes.NotFound},
		{"RD-11 GEN-20 empty", emptyDigest, 0, 0, nil, codes.OK},
		{"GEN-21 impossible", impossibleDigest, 0, 0, nil, codes.NotFound},
	} {
		t.Run(test.row, func(t *testing.T) {
			frames, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: packedReadName(test.d), ReadOffset: test.offset, ReadLimit: test.limit})
			wantCode(t, "Read", err, test.code)
			got, err := unpack(frames)
			if err != nil || !bytes.Equal(got, test.want) {
				t.Errorf("Read = %d bytes, %v, want %d, or their content differs", len(got), err, len(test.want))
			}
		})
	}
	t.Run("RD-13 X-49 a damaged blob", func(t *testing.T) {
		h := start(t, faulty(damaged))
		frames, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: packedReadName(h.put(t, random(100)))})
		wantCode(t, "Read", err, codes.DataLoss)
		if got, err := unpack(frames); err == nil && len(got) >= 100 {
			t.Errorf("%d bytes of a damaged blob", len(got))
		}
	})
}

// compressedUpload is one upload of data as zstd.
type compressedUpload struct {
	row    string
	data   []byte // the blob
	frames []byte // what is sent
	code   codes.Code
}

func TestCompressedWrite(t *testing.T) {
	h := start(t)
	const bad = codes.InvalidArgument
	small, large := text(1000), text(3<<20)
	flip := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 1
		return b
	}
	checked := pack(small, zstd.WithEncoderCRC(true))
	dict := append([]byte{0x28, 0xB5, 0x2F, 0xFD, 0x21, 0x07, 10, 1 | 10<<3, 0, 0}, make([]byte, 10)...) // dictionary 7, a raw block
	reserved := append([]byte{0x28, 0xB5, 0x2F, 0xFD, 0x20, 10, 1 | 3<<1 | 10<<3, 0, 0}, make([]byte, 10)...)
	legacy := append([]byte{0x27, 0xB5, 0x2F, 0xFD}, pack(small)[4:]...)
	window := []byte{0x28, 0xB5, 0x2F, 0xFD, 0x00, 19 << 3, 1, 0, 0} // 512 MiB
	long := packStream(text(9<<20), zstd.WithWindowSize(16<<20))
	lying := bytes.Clone(pack(text(300)))
	binary.LittleEndian.PutUint16(lying[5:], 60_000) // the frame's content size
	for _, test := range []compressedUpload{
		{"WR-16 WR-21 small", small, pack(small), codes.OK},
		{"WR-9 WR-21 large, without its size", large, packStream(large), codes.OK},
		{"ZST-1 X-56 two frames", small, append(pack(small[:400]), pack(small[400:])...), codes.OK},
		{"ZST-1 skippable frames", text(999), nil, codes.OK},
		{"ZST-6 right checksum", text(998), nil, codes.OK},
		{"WR-16 X-54 truncated", text(1001), pack(text(1001))[:40], bad},
		{"WR-16 X-54 truncated at its end", large[1:], packStream(large[1:])[:1000], bad},
		{"WR-16 another blob", text(1002), pack(text(1002)), bad},
		{"WR-16 fewer bytes", text(1003), pack(text(1002)), bad},
		{"ZST-4 X-55 a byte behind the frame", text(1004), nil, bad},
		{"ZST-4 X-55 another format behind the frame", text(1005), nil, bad},
		{"ZST-5 X-51 a bomb", random(10), pack(make([]byte, 64<<20)), bad},
		{"ZST-6 X-63 wrong checksum", small[1:], nil, bad},
		{"ZST-2 X-53 a window of 512 MiB", random(10), window, bad},
		{"ZST-2 a window of 16 MiB", text(9 << 20), long, bad},
		{"ZST-3 X-60 dictionary", make([]byte, 10), dict, bad},
		{"X-60 reserved block type", make([]byte, 10), reserved, bad},
		{"X-60 an old format", small[2:], legacy, bad},
		{"X-57 only skippable frames", random(11), skippable(100), bad},
		{"X-57 nothing", random(12), nil, bad},
		{"X-59 a frame that lies about its size", text(300), lying, bad},
		{"X-61 plain data", random(1000), nil, bad},
		{"ZST-7 X-58 endless skippable frames", random(13), bytes.Repeat(skippable(64<<10), 64), bad},
		{"ZST-7 X-58 endless empty frames", random(14), bytes.Repeat(pack(nil), 500_000), bad},
	} {
		switch test.row { // where the frames depend on data that is random
		case "ZST-1 skippable frames":
			test.frames = append(append(skippable(10), pack(test.data)...), skippable(0)...)
		case "ZST-6 right checksum":
			test.frames = pack(test.data, zstd.WithEncoderCRC(true))
		case "ZST-4 X-55 a byte behind the frame":
			test.frames = append(pack(test.data), 'x')
		case "ZST-4 X-55 another format behind the frame":
			test.frames = append(pack(test.data), "PK\x03\x04 and so on"...)
		case "ZST-6 X-63 wrong checksum":
			test.data, test.frames = small, flip(checked, len(checked)-1)
			test.data = append([]byte("!"), test.data[1:]...)
			test.frames = pack(test.data, zstd.WithEncoderCRC(true))
			test.frames = flip(test.frames, len(test.frames)-1)
		case "X-61 plain data":
			test.frames = test.data
		}
		t.Run(test.row, func(t *testing.T) {
			d := space.Of(test.data)
			for _, size := range []int{16 << 10, 1 << 20} {
				resp, err := h.write(t.Context(), chunks(packedName(d), test.frames, size)...)
				wantCode(t, "Write", err, test.code)
				if test.code == codes.OK && resp.GetCommittedSize() != int64(len(test.frames)) && resp.GetCommittedSize() != -1 {
					t.Errorf("committed_size %d, want %d", resp.GetCommittedSize(), len(test.frames))
				}
				if h.missing(t, d) != (test.code != codes.OK) {
					t.Fatalf("missing: %v after %v", h.missing(t, d), test.code)
				}
			}
			if test.code != codes.OK {
				return
			}
			if got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}); err != nil || !bytes.Equal(got, test.data) {
				t.Errorf("Read = %d bytes, %v", len(got), err)
			}
		})
	}
	eventually(t, "no handler left", func() bool { return handlers() == 0 })
}

func TestCompressedOffsets(t *testing.T) {
	h := start(t)
	upload := func() (string, []byte) { b := text(100_000); return packedName(space.Of(b)), pack(b) }
	t.Run("WR-21 committed_size is what was sent", func(t *testing.T) {
		name, frames := upload()
		resp, err := h.write(t.Context(), chunks(name, frames, 1000)...)
		if err != nil || resp.GetCommittedSize() != int64(len(frames)) {
			t.Errorf("Write = %v, %v, want %d", resp, err, len(frames))
		}
	})
	t.Run("WR-9 offsets of the plain bytes", func(t *testing.T) {
		name, frames := upload()
		m := chunks(name, frames, len(frames)/2+1)
		m[1].WriteOffset = 50_000
		_, err := h.write(t.Context(), m...)
		wantCode(t, "Write", err, codes.InvalidArgument, "write_offset")
	})
	t.Run("WR-10 begins in the middle", func(t *testing.T) {
		name, frames := upload()
		_, err := h.write(t.Context(), &bytestream.WriteRequest{ResourceName: name, WriteOffset: 10, Data: frames[10:], FinishWrite: true})
		wantCode(t, "Write", err, codes.InvalidArgument, "write_offset")
	})
	t.Run("QWS-7 WR-10 half of an upload", func(t *testing.T) {
		name, frames := upload()
		resp, err := h.write(t.Context(), chunks(name, frames, len(frames)/2)[0])
		if err != nil || resp.GetCommittedSize() != 0 {
			t.Errorf("half of an upload: %v, %v, want committed_size 0", resp, err)
		}
		q, err := h.bytes.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name})
		if err != nil || q.GetCommittedSize() != 0 || q.GetComplete() {
			t.Errorf("QueryWriteStatus = %v, %v, want {0, false}", q, err)
		}
	})
	t.Run("WR-17 present", func(t *testing.T) {
		data := text(200_000)
		d := h.put(t, data)
		stream, err := h.bytes.Write(t.Context())
		if err != nil {
			t.Fatalf("Write: %v", err)
		}
		name := packedName(d)
		if err := stream.Send(&bytestream.WriteRequest{ResourceName: name, Data: pack(data)[:100]}); err != nil {
			t.Fatalf("Send: %v", err)
		}
		resp := new(bytestream.WriteResponse)
		if err := stream.RecvMsg(resp); err != nil || resp.GetCommittedSize() != -1 {
			t.Errorf("%v, %v, want committed_size -1 at once", resp, err)
		}
		q, err := h.bytes.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name})
		if err != nil || q.GetCommittedSize() != d.Size() || !q.GetComplete() { // QWS-4
			t.Errorf("QueryWriteStatus = %v, %v, want {%d, true}", q, err, d.Size())
		}
	})
	for what, frames := range map[string][]byte{"nothing": nil, "an empty frame": pack(nil), "a skippable frame": skippable(3)} {
		t.Run("WR-23 X-57 the empty blob as "+what, func(t *testing.T) {
			if _, err := h.write(t.Context(), chunks(packedName(emptyDigest), frames, 100)...); err != nil {
				t.Errorf("Write: %v", err)
			}
		})
	}
	for _, compressor := range []string{"deflate", "brotli", "identity", "gzip", "ZSTD", "zstd%20", ""} {
		t.Run("RD-16 ZST-8 X-62 CAP-8 compressor "+compressor, func(t *testing.T) {
			d := h.put(t, text(10))
			resource := "compressed-blobs/" + compressor + "/" + d.Blob()[len("blobs/"):]
			_, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: resource})
			wantCode(t, "Read", err, codes.InvalidArgument)
			_, err = h.write(t.Context(), chunks("uploads/"+uuid.NewString()+"/"+resource, text(10), 10)...)
			wantCode(t, "Write", err, codes.InvalidArgument)
		})
	}
	t.Run("X-61 compressed data as plain", func(t *testing.T) {
		data := text(1000)
		_, err := h.write(t.Context(), chunks(uploadName(space.Of(data)), pack(data), 1000)...)
		wantCode(t, "Write", err, codes.InvalidArgument)
	})
}

// What came in one form goes out in any.
func TestEveryFormOfABlob(t *testing.T) {
	h := start(t)
	for _, size := range []int{50, 100_000, 2 << 20} {
		for from, put := range map[string]func([]byte) error{
			"plain": func(b []byte) error {
				_, err := h.write(t.Context(), chunks(uploadName(space.Of(b)), b, 1<<20)...)
				return err
			},
			"zstd": func(b []byte) error {
				_, err := h.write(t.Context(), chunks(packedName(space.Of(b)), pack(b), 1<<20)...)
				return err
			},
			"zstd in a batch": func(b []byte) error {
				h.update(t, &repb.BatchUpdateBlobsRequest_Request{Digest: space.Of(b).Proto(), Data: pack(b), Compressor: repb.Compressor_ZSTD})
				return nil
			},
		} {
			t.Run(fmt.Sprintf("GEN-23 CAP-8 CAP-9 %d bytes from %s", size, from), func(t *testing.T) {
				data := text(size)
				d := space.Of(data)
				if err := put(data); err != nil {
					t.Fatalf("upload: %v", err)
				}
				plain, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()})
				packed, err2 := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: packedReadName(d)})
				unpacked, err3 := unpack(packed)
				if err := errors.Join(err, err2, err3); err != nil || !bytes.Equal(plain, data) || !bytes.Equal(unpacked, data) {
					t.Errorf("Read = %d bytes plain, %d of zstd, %v", len(plain), len(unpacked), err)
				}
				for _, acceptable := range [][]repb.Compressor_Value{nil, {repb.Compressor_ZSTD}} {
					resp, err := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(d), AcceptableCompressors: acceptable})
					if err != nil || !bytes.Equal(unpackResponse(t, resp.GetResponses()[0]), data) {
						t.Errorf("BatchReadBlobs accepting %v: %v", acceptable, err)
					}
				}
			})
		}
	}
}

// unpackResponse is the data of a response as it was before compression.
func unpackResponse(t testing.TB, r *repb.BatchReadBlobsResponse_Response) []byte {
	t.Helper()
	if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
		t.Fatalf("status %v", code)
	}
	if r.GetCompressor() == repb.Compressor_IDENTITY {
		return r.GetData()
	}
	data, err := unpack(r.GetData())
	if err != nil {
		t.Fatalf("unpack: %v", err)
	}
	return data
}

func TestIdleCompressedUploads(t *testing.T) {
	h := start(t)
	data := text(1 << 20)
	name, frames := packedName(space.Of(data)), pack(data)
	t.Run("ZST-9 X-64 two hundred idle ones", func(t *testing.T) {
		for range 200 {
			other := text(100_000)
			stream, err := h.bytes.Write(t.Context())
			if err != nil {
				t.Fatalf("Write: %v", err)
			}
			if err := stream.Send(&bytestream.WriteRequest{ResourceName: packedName(space.Of(other)), Data: pack(other)[:500]}); err != nil {
				t.Fatalf("Send: %v", err)
			}
		}
		eventually(t, "all are served", func() bool { return handlers() >= 200 })
		if resp, err := h.write(t.Context(), chunks(name, frames, 16<<10)...); err != nil || resp.GetCommittedSize() != int64(len(frames)) {
			t.Errorf("the active one: %v, %v", resp, err)
		}
	})
}

func TestTooManyUploads(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Limits.MaxUploads, c.Limits.MaxCompressedUploads = 3, 1 })
	send := func(name string, data []byte) error {
		_, err := h.write(t.Context(), chunks(name, data, 100)...)
		return err
	}
	t.Run("X-30 one above the limit", func(t *testing.T) {
		data := text(1000)
		d := space.Of(data)
		idle := make([]bytestream.ByteStream_WriteClient, 3)
		for i := range idle {
			stream, err := h.bytes.Write(t.Context())
			if err != nil {
				t.Fatalf("Write: %v", err)
			}
			name, part := uploadName(absentOf(1000)), data[:10]
			if i == 0 {
				name, part = packedName(absentOf(1000)), pack(data)[:10]
			}
			if err := stream.Send(&bytestream.WriteRequest{ResourceName: name, Data: part}); err != nil {
				t.Fatalf("Send: %v", err)
			}
			idle[i] = stream
			// It has its slot, unlike one that was refused and is not quite gone.
			eventually(t, "the store reads it", func() bool { return goroutines("jetfarm/frontend.(*upload).Read(") > i })
			if i == 0 {
				err := send(packedName(d), pack(data))
				if wantCode(t, "a second compressed one", err, codes.ResourceExhausted); len(status.Convert(err).Details()) != 1 {
					t.Errorf("details %v, want a RetryInfo", status.Convert(err).Details())
				}
			}
		}
		err := send(uploadName(d), data)
		if wantCode(t, "a fourth", err, codes.ResourceExhausted); len(status.Convert(err).Details()) != 1 {
			t.Errorf("details %v, want a RetryInfo", status.Convert(err).Details())
		}
		if err := idle[1].CloseSend(); err != nil {
			t.Fatalf("CloseSend: %v", err)
		}
		eventually(t, "there is room again", func() bool { return send(uploadName(d), data) == nil })
	})
}

// absentOf is the digest of n bytes that nobody has.
func absentOf(n int) digest.Digest { return space.Of(random(n)) }

// What is stored as a frame is handed out as that frame: whoever asks, nothing is compressed again.
func TestZST_10_StoredFramesAreHandedOut(t *testing.T) {
	h := start(t)
	data := text(300_000)
	d := space.Of(data)
	// A frame that this farm would not make: it has a checksum, and another level.
	stored := pack(data, zstd.WithEncoderCRC(true), zstd.WithEncoderLevel(zstd.SpeedBestCompression))
	_, err := h.js.PublishMsg(t.Context(), &nats.Msg{
		Subject: fmt.Sprintf("$O.cas-s-1-0.C.%s.sha256.%s-%d", d.Hash()[:2], d.Hash(), d.Size()),
		Header:  nats.Header{"Jetfarm-Encoding": {"zstd"}}, Data: stored,
	})
	if err != nil {
		t.Fatalf("PublishMsg: %v", err)
	}
	for range 100 {
		got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: packedReadName(d)})
		if err != nil || !bytes.Equal(got, stored) {
			t.Fatalf("Read = %d bytes, %v, want the %d that are stored", len(got), err, len(stored))
		}
	}
	if got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}); err != nil || !bytes.Equal(got, data) {
		t.Errorf("Read of the plain bytes = %d bytes, %v", len(got), err)
	}
}
