package frontend_test

import (
	"bytes"
	crand "crypto/rand"
	"errors"
	"io"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/frontend"
)

// flood stores blobs that nobody asks for, of so many bytes together.
func (h *harness) flood(t testing.TB, size int) {
	t.Helper()
	for data := make([]byte, 900<<10); size > 0; size -= len(data) {
		_, _ = crand.Read(data)
		h.put(t, data)
	}
}

// A client that reads slowly gets all of a blob, although as much as the budget comes in meanwhile.
func TestRD_17_EvictionDoesNotCutReads(t *testing.T) {
	const budget = 48 << 20
	h := startOnBudget(t, budget)
	conn := h.dial(t, grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	for form, resource := range map[string]func(digest.Digest) string{
		"plain": digest.Digest.String, "zstd": packedReadName,
	} {
		t.Run(form, func(t *testing.T) {
			data, twin := random(6<<20), h.put(t, random(900<<10))
			d := h.put(t, data)
			stream, err := bytestream.NewByteStreamClient(conn).Read(t.Context(), &bytestream.ReadRequest{ResourceName: resource(d)})
			if err != nil {
				t.Fatalf("Read: %v", err)
			}
			var got []byte
			for {
				m, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatalf("after %d bytes: %v", len(got), err)
				}
				got = append(got, m.GetData()...)
				h.flood(t, budget/8) // two budgets during the read
			}
			if form == "zstd" {
				got = must(unpack(got))
			}
			if !bytes.Equal(got, data) {
				t.Errorf("%d of %d bytes, or others", len(got), len(data))
			}
			if !h.missing(t, twin) {
				t.Error("a blob that nobody read is still there, so nothing was evicted")
			}
		})
	}
}

// What FindMissingBlobs has found is there for an Execute, although a quarter of the budget comes in between.
func TestFMB_10_FoundStaysForExecute(t *testing.T) {
	const budget = 64 << 20
	h := startOnBudget(t, budget)
	q := h.queue(t)
	twin, input := h.put(t, random(1000)), random(700<<10)
	root := h.putMessage(t, &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: h.put(t, input).Proto()}}})
	command := h.putMessage(t, &repb.Command{Arguments: []string{"/bin/true"}, OutputPaths: []string{name(t.Name())}})
	action := h.putMessage(t, &repb.Action{CommandDigest: command.Proto(), InputRootDigest: root.Proto()})
	h.flood(t, 8*budget/10)
	all := []digest.Digest{action, command, root, space.Of(input)}
	resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{BlobDigests: protos(all...)})
	if err != nil || len(resp.GetMissingBlobDigests()) > 0 {
		t.Fatalf("FindMissingBlobs = %v, %v", resp, err)
	}
	h.flood(t, budget/4)
	if !h.missing(t, twin) {
		t.Fatal("a blob that nobody asked for is still there, so nothing was evicted")
	}
	stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	lease := begin(t, q)
	for _, d := range all {
		h.present(t, d)
	}
	settle(t, lease, &repb.ExecuteResponse{Result: &repb.ActionResult{}})
	if got, _ := finish(t, stream, action); got.GetStatus().GetCode() != 0 {
		t.Errorf("Execute = %v", got)
	}
}

// maintained is the store of a frontend that cleans up after uploads that broke off so long ago.
func maintained(t testing.TB, farm *brokertest.Farm, orphanAge time.Duration) func(*frontend.Config) {
	t.Helper()
	return func(c *frontend.Config) {
		store, err := objectstore.Open(t.Context(), objectstore.Config{
			Small: farm.Connect(t), Bulk: farm.Connect(t), Log: c.Log, Maintain: true, OrphanAge: orphanAge,
		})
		if err != nil {
			t.Fatalf("objectstore.Open: %v", err)
		}
		running(t, ignoreEnd(store.Run))
		c.Blobs = store
	}
}

// An upload that broke off and that nobody takes up again leaves nothing, also when the frontend that had
// it is gone.
func TestQWS_8_X_39_PartsExpire(t *testing.T) {
	farm := brokertest.Start(t)
	first := startOn(t, farm)
	first.warm(t)
	before := first.bytesStored(t)
	data := random(3 << 20)
	upload := uploadName(space.Of(data))
	first.breakOff(t, upload, data, 2<<20)
	if q := first.query(t, upload); q != (queried{2 << 20, false}) {
		t.Fatalf("QueryWriteStatus = %v", q)
	}
	first.server.GRPC().Stop()
	h := startOn(t, farm, maintained(t, farm, 2*time.Second))
	eventually(t, "nothing is kept", func() bool { return h.query(t, upload) == queried{} })
	eventually(t, "its bytes are released", func() bool { return h.bytesStored(t) < before+64<<10 })
	if _, err := h.write(t.Context(), from(upload, data, 0)); err != nil {
		t.Errorf("Write from the start: %v", err)
	}
}

// Uploads that are left half done stay within the budget of the store: the oldest give way.
func TestX_39_ManyParts(t *testing.T) {
	const budget, part = 24 << 20, 1 << 20
	h := startOnBudget(t, budget)
	found := h.put(t, random(1000))
	var uploads []string
	for range 2 * budget / part {
		data := random(part + 100)
		uploads = append(uploads, uploadName(space.Of(data)))
		if _, err := h.write(t.Context(), &bytestream.WriteRequest{ResourceName: uploads[len(uploads)-1], Data: data[:part]}); err != nil {
			t.Fatalf("upload %d: %v", len(uploads), err)
		}
		if h.missing(t, found) {
			t.Fatal("parts push out what clients ask for")
		}
		if n := h.bytesStored(t); n > budget+budget/10 {
			t.Fatalf("%d bytes are stored after %d parts, want at most %d", n, len(uploads), budget)
		}
	}
	if q := h.query(t, uploads[0]); q != (queried{}) {
		t.Errorf("QueryWriteStatus = %v of the oldest", q)
	}
	if q := h.query(t, uploads[len(uploads)-1]); q != (queried{part, false}) {
		t.Errorf("QueryWriteStatus = %v of the newest", q)
	}
}

// An entry of the action cache that is asked for outlives those that are not.
func TestACG_12_UsedEntriesStay(t *testing.T) {
	const room = 128 << 10
	farm := brokertest.Start(t)
	h := startOn(t, farm, func(c *frontend.Config) {
		actions, err := actioncache.Open(t.Context(), actioncache.Config{
			Conn: farm.Connect(t), Blobs: c.Blobs, Log: c.Log, MaxBytes: room, Refresh: time.Nanosecond,
		})
		if err != nil {
			t.Fatalf("actioncache.Open: %v", err)
		}
		c.Actions = actions
		c.AllowActionCacheUpdates = true
	})
	update := func() digest.Digest {
		action := h.action(t)
		_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: h.result(t)})
		if err != nil {
			t.Fatalf("UpdateActionResult: %v", err)
		}
		return action
	}
	used, unused := update(), update()
	for i := range 750 { // several times the room
		update()
		if _, err := h.get(t, used); err != nil {
			t.Fatalf("after %d others the entry that is used is gone: %v", i, err)
		}
	}
	if _, err := h.get(t, unused); err == nil {
		t.Error("an entry that nobody asked for is still there, so none gave way")
	}
}
