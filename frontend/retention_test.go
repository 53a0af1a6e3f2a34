package frontend_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/frontend"
)

// startOnBudget is a frontend whose store evicts.
func startOnBudget(t testing.TB, budget int64) *harness {
	t.Helper()
	farm := brokertest.Start(t)
	return startOn(t, farm, allowUpdates, func(c *frontend.Config) {
		store, err := objectstore.Open(t.Context(), objectstore.Config{
			Small: farm.Connect(t), Bulk: farm.Connect(t), Log: c.Log, Maintain: true, MaxSize: budget,
		})
		if err != nil {
			t.Fatalf("objectstore.Open: %v", err)
		}
		running(t, ignoreEnd(store.Run))
		eventually(t, "the store keeps its budget", func() bool {
			u, err := store.Usage(t.Context())
			return err == nil && u.Limit == budget
		})
		actions, err := actioncache.Open(t.Context(), actioncache.Config{Conn: farm.Connect(t), Blobs: store, Log: c.Log})
		if err != nil {
			t.Fatalf("actioncache.Open: %v", err)
		}
		c.Blobs, c.Actions = store, actions
	})
}

// ignoreEnd is a service for which the end of its context is no error.
func ignoreEnd(service func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := service(ctx); !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	}
}

// What clients ask for stays when as much as the whole budget comes in; what nobody asks for goes.
func TestUsedBlobsStay(t *testing.T) {
	h := startOnBudget(t, 24<<20)
	twin, found, batched, read, packed := random(1000), random(1000), random(1000), random(600<<10), random(600<<10)
	child := leaf("child")
	root := directory(space.Of(encode(child)))
	kept := map[string][]byte{
		"FMB-2 GEN-22 found":          found,
		"BRB-12 GEN-22 read in batch": batched,
		"RD-18 read":                  read,
		"RD-18 read compressed":       packed,
		"TREE-13 root of a tree":      encode(root),
		"TREE-13 child of a tree":     encode(child),
	}
	for _, data := range kept {
		h.put(t, data)
	}
	action := h.action(t)
	result, places := h.fullResult(t)
	h.cache(t, action, result)
	gone := h.put(t, twin)

	use := func() {
		if h.missing(t, space.Of(found)) {
			t.Fatal("a blob that is looked for again and again is missing")
		}
		_, err1 := h.cas.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: protos(space.Of(batched))})
		_, err2 := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: space.Of(read).String()})
		_, err3 := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: packedReadName(space.Of(packed))})
		_, err4 := h.tree(t.Context(), &repb.GetTreeRequest{RootDigest: space.Of(encode(root)).Proto()})
		_, err5 := h.get(t, action)
		if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
			t.Fatalf("use: %v", err)
		}
	}
	// Asking for the twin would keep it, so that is done once, when it must have gone.
	for range 90 {
		use()
		h.put(t, random(900<<10))
	}
	if !h.missing(t, gone) {
		t.Error("a blob that nobody asked for is still there, so nothing was evicted")
	}
	for row, data := range kept {
		t.Run(row, func(t *testing.T) {
			got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: space.Of(data).String()})
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("Read = %d bytes, %v", len(got), err)
			}
		})
	}
	for place, d := range places {
		t.Run("ACG-3 "+place+" of a result", func(t *testing.T) { h.present(t, d) })
	}
}

// present fails the test when a blob cannot be read.
func (h *harness) present(t testing.TB, d digest.Digest) {
	t.Helper()
	if _, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String()}); err != nil {
		t.Errorf("Read: %v", err)
	}
}
