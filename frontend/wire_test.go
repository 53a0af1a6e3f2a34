package frontend_test

import (
	"bytes"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/frontend"
)

// The messages that are taken apart by hand mean what they mean to the library.
func FuzzWriteRequest(f *testing.F) {
	data := random(3000)
	for _, m := range []*bytestream.WriteRequest{
		{},
		{ResourceName: "uploads/x", WriteOffset: 7, FinishWrite: true, Data: data},
		{WriteOffset: -1, Data: data[:1]},
		{FinishWrite: true},
	} {
		f.Add(encode(m), 100)
	}
	// The data first, twice, not last, of no length, too long; a name that is no text; an unknown field.
	field := func(number protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), value)
	}
	name := field(1, []byte("uploads/x"))
	f.Add(append(field(10, data), name...), 10)
	f.Add(append(field(10, data), field(10, data[:5])...), 10_000)
	f.Add(append(name, field(10, nil)...), 3)
	f.Add(append(name, append(protowire.AppendTag(nil, 10, protowire.BytesType), 200)...), 50)
	f.Add(field(1, []byte("\xff")), 50)
	f.Add(append(field(77, []byte("?")), field(10, data[:9])...), 50)
	f.Add(protowire.AppendVarint(protowire.AppendTag(nil, 10, protowire.VarintType), 1<<63), 50)
	f.Fuzz(func(t *testing.T, message []byte, cut int) {
		want := new(bytestream.WriteRequest)
		wantErr := proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(message, want)
		got, err := frontend.DecodeWriteRequest(message, max(cut, 1))
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("error %v, want %v", err, wantErr)
		}
		if err == nil && !proto.Equal(got, want) {
			t.Errorf("decoded %v, want %v", got, want)
		}
	})
}

func TestReadResponse(t *testing.T) {
	for _, n := range []int{0, 1, 127, 128, 40_000, 1 << 20} {
		data := random(n)
		message, err := frontend.EncodeReadResponse(data)
		got := new(bytestream.ReadResponse)
		if err := proto.Unmarshal(message, got); err != nil {
			t.Fatalf("Unmarshal: %v", err)
		}
		if err != nil || !bytes.Equal(got.GetData(), data) {
			t.Errorf("%d bytes came out as %d, %v", n, len(got.GetData()), err)
		}
	}
}
