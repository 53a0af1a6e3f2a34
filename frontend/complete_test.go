package frontend_test

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// startOnMemory is a frontend whose blobs a test can remove and break.
func startOnMemory(t testing.TB, plan func(op castest.Op, d digest.Digest) castest.Fault) (*harness, *castest.Memory) {
	t.Helper()
	farm, memory := brokertest.Start(t), castest.NewMemory()
	blobs := &castest.Faulty{Store: memory, Plan: plan}
	return startOn(t, farm, allowUpdates, func(c *frontend.Config) {
		actions, err := actioncache.Open(t.Context(), actioncache.Config{Conn: farm.Connect(t), Blobs: blobs, Log: c.Log})
		if err != nil {
			t.Fatalf("actioncache.Open: %v", err)
		}
		c.Blobs, c.Actions = blobs, actions
	}), memory
}

// fullResult is a result with blobs in every place where one can be, by the name of the place.
func (h *harness) fullResult(t testing.TB) (*repb.ActionResult, map[string]digest.Digest) {
	t.Helper()
	places := map[string]digest.Digest{}
	put := func(place string, data []byte) *repb.Digest {
		places[place] = h.put(t, data)
		return places[place].Proto()
	}
	inner := &repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: put("file in a directory of a tree", random(20))}}}
	root := &repb.Directory{
		Files:       []*repb.FileNode{{Name: "g", Digest: put("file in a tree", random(20))}},
		Directories: []*repb.DirectoryNode{{Name: "d", Digest: space.Of(encode(inner)).Proto()}},
	}
	put("directory below a root", encode(inner))
	result := &repb.ActionResult{
		OutputFiles: []*repb.OutputFile{{Path: "a", Digest: put("output file", random(20))}},
		OutputDirectories: []*repb.OutputDirectory{{
			Path: "d", TreeDigest: put("tree", encode(&repb.Tree{Root: root, Children: []*repb.Directory{inner}})),
			RootDirectoryDigest: put("root directory", encode(root)),
		}},
		StdoutDigest: put("stdout", random(20)), StderrDigest: put("stderr", random(20)),
		ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"},
	}
	return result, places
}

func (h *harness) get(t testing.TB, action digest.Digest) (*repb.ActionResult, error) {
	t.Helper()
	return h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
}

func TestIncompleteResults(t *testing.T) {
	var down, full atomic.Bool
	h, memory := startOnMemory(t, func(op castest.Op, _ digest.Digest) castest.Fault {
		if down.Load() && op != castest.OpPut {
			return castest.Fault{After: -1, Err: cas.ErrUnavailable}
		}
		if full.Load() && op == castest.OpPut {
			return castest.Fault{After: -1, Err: cas.ErrFull}
		}
		return castest.Fault{}
	})
	action := h.action(t)
	result, places := h.fullResult(t)
	update := func(action digest.Digest) error {
		_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: proto.CloneOf(result)})
		return err
	}
	if err := update(action); err != nil {
		t.Fatalf("UpdateActionResult: %v", err)
	}
	for place, d := range places {
		t.Run("ACG-2 ACU-4 X-149 without the "+place, func(t *testing.T) {
			data, err := cas.ReadAll(t.Context(), memory, d, d.Size())
			if err != nil {
				t.Fatalf("ReadAll: %v", err)
			}
			memory.Remove(d)
			_, err = h.get(t, action)
			wantCode(t, "GetActionResult", err, codes.NotFound)
			fresh := h.action(t)
			wantCode(t, "UpdateActionResult", update(fresh), codes.FailedPrecondition)
			_, err = h.get(t, fresh)
			wantCode(t, "GetActionResult of what was refused", err, codes.NotFound)
			h.put(t, data)
			if got, err := h.get(t, action); err != nil || !proto.Equal(got, result) {
				t.Errorf("GetActionResult with all blobs again: %v, %v", got, err)
			}
		})
	}
	t.Run("ACG-4 when the store cannot tell", func(t *testing.T) {
		down.Store(true)
		defer down.Store(false)
		_, err := h.get(t, action)
		wantCode(t, "GetActionResult", err, codes.Unavailable)
	})
	t.Run("ACU-5 when the store is full", func(t *testing.T) {
		fresh := h.action(t)
		full.Store(true)
		defer full.Store(false)
		_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: fresh.Proto(), ActionResult: &repb.ActionResult{StdoutRaw: random(100)}})
		wantCode(t, "UpdateActionResult", err, codes.ResourceExhausted)
	})
	t.Run("ACG-15 without the action itself", func(t *testing.T) {
		memory.Remove(action)
		if _, err := h.get(t, action); err != nil {
			t.Errorf("GetActionResult: %v", err)
		}
		wantCode(t, "UpdateActionResult", update(action), codes.FailedPrecondition) // it needs the action
	})
	t.Run("X-151 with a tree that is garbage", func(t *testing.T) {
		garbage := h.put(t, []byte("no tree, since 0x6e is no tag of one"))
		result := proto.CloneOf(result)
		result.OutputDirectories[0].TreeDigest = garbage.Proto()
		fresh := h.action(t)
		_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: fresh.Proto(), ActionResult: result})
		if err == nil {
			t.Error("a result with a garbage tree was stored")
		}
		_, err = h.get(t, fresh)
		wantCode(t, "GetActionResult", err, codes.NotFound)
	})
	t.Run("X-151 with a tree that is damaged", func(t *testing.T) {
		fresh := h.action(t)
		if err := update(fresh); err != nil {
			t.Fatalf("UpdateActionResult: %v", err)
		}
		memory.Corrupt(places["tree"], []byte("damage"))
		if _, err := h.get(t, fresh); err == nil {
			t.Error("a result with a damaged tree is a hit")
		}
	})
}

func TestStoredEntries(t *testing.T) {
	h := start(t, allowUpdates)
	t.Run("ACG-9 an entry that is garbage", func(t *testing.T) {
		action := h.action(t)
		h.cache(t, action, h.result(t))
		var subject, stream string
		list := h.js.ListStreams(t.Context())
		for info := range list.Info() {
			if len(info.Config.Subjects) != 1 {
				continue
			}
			s, err := h.js.Stream(t.Context(), info.Config.Name)
			if err != nil {
				t.Fatalf("Stream: %v", err)
			}
			if last, err := s.GetMsg(t.Context(), info.State.LastSeq); err == nil && strings.HasPrefix(info.Config.Name, "KV_") && strings.Contains(last.Subject, action.Hash()) {
				subject, stream = last.Subject, info.Config.Name
			}
		}
		if subject == "" {
			t.Fatal("the entry is not in any bucket")
		}
		if _, err := h.js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Data: []byte("\xff garbage")}); err != nil {
			t.Fatalf("write garbage into %s: %v", stream, err)
		}
		eventually(t, "the garbage is seen", func() bool {
			_, err := h.get(t, action)
			return err != nil
		})
		_, err := h.get(t, action)
		wantCode(t, "GetActionResult", err, codes.NotFound)
		h.cache(t, action, h.result(t))
		if _, err := h.get(t, action); err != nil {
			t.Errorf("GetActionResult of a new result: %v", err)
		}
	})
	t.Run("X-153 updates and reads at once", func(t *testing.T) {
		action := h.action(t)
		results := []*repb.ActionResult{h.result(t), h.result(t)}
		results[1].ExitCode = 7
		h.cache(t, action, results[0])
		var g errgroup.Group
		for i := range 8 {
			g.Go(func() error {
				for range 20 {
					if i%2 == 0 {
						_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: proto.CloneOf(results[i/2%2])})
						if err != nil {
							return fmt.Errorf("UpdateActionResult: %w", err)
						}
						continue
					}
					got, err := h.get(t, action)
					if err != nil {
						return fmt.Errorf("GetActionResult: %w", err)
					}
					if !proto.Equal(got, results[0]) && !proto.Equal(got, results[1]) {
						return errors.New("GetActionResult returned a result that nobody wrote")
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Run("X-101 a hundred thousand files to inline", func(t *testing.T) {
		action := h.action(t)
		h.cache(t, action, h.result(t))
		paths := []string{"a/b.d"}
		for i := range 100_000 {
			paths = append(paths, fmt.Sprint("no/such/file", i))
		}
		got, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto(), InlineOutputFiles: paths})
		if err != nil || string(got.GetOutputFiles()[0].GetContents()) != "deps of b" {
			t.Errorf("GetActionResult = %v, %v", got, err)
		}
	})
	for what, priority := range map[string]int32{"lowest": -1000, "none": 0, "highest": 1000} {
		t.Run("CAP-14 ACU-7 the "+what+" priority", func(t *testing.T) {
			action := h.action(t)
			_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{
				ActionDigest: action.Proto(), ActionResult: h.result(t), ResultsCachePolicy: &repb.ResultsCachePolicy{Priority: priority},
			})
			if err != nil {
				t.Errorf("UpdateActionResult: %v", err)
			}
			op, _ := recv(t, h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto(), ExecutionPolicy: &repb.ExecutionPolicy{Priority: priority}}))
			if op.GetName() == "" {
				t.Error("Execute has no operation")
			}
		})
	}
}

// Checking a result whose tree has very many nodes takes little memory, and one with too many is a miss.
func TestACG_16_ChecksAreBounded(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(20))
	h := start(t)
	link := func(i int) *repb.SymlinkNode { return &repb.SymlinkNode{Name: fmt.Sprint("l", i), Target: "t"} } // names no blob
	child := &repb.Directory{}
	for i := range 9999 {
		child.Symlinks = append(child.Symlinks, link(i))
	}
	encoded := encode(child)
	for nodes, hit := range map[int]bool{900_000: true, 1_100_000: false} {
		t.Run(fmt.Sprint(nodes, " nodes"), func(t *testing.T) {
			tree := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), nil)
			for range nodes / 10_000 {
				tree = protowire.AppendBytes(protowire.AppendTag(tree, 2, protowire.BytesType), encoded)
			}
			result := h.result(t)
			result.OutputDirectories = []*repb.OutputDirectory{{Path: "d", TreeDigest: h.put(t, tree).Proto()}}
			action := h.action(t)
			h.entry(t, action, result)
			before := heap()
			most, call := before, make(chan error, 1)
			go func() {
				_, err := h.get(t, action)
				call <- err
			}()
			var err error
			for ended := false; !ended; {
				select {
				case err = <-call:
					ended = true
				default:
					most = max(most, heap())
				}
			}
			if hit && err != nil || !hit && status.Code(err) != codes.NotFound {
				t.Errorf("GetActionResult: %v, want a hit %v", err, hit)
			}
			if most > before+64<<20 {
				t.Errorf("the check took %d MiB", (most-before)>>20)
			}
		})
	}
}

// entry stores a result that no client could store: it was complete once, or an older farm has stored it.
func (h *harness) entry(t testing.TB, action digest.Digest, result *repb.ActionResult) {
	t.Helper()
	value := append([]byte{1}, encode(result)...)
	if _, err := h.js.Publish(t.Context(), fmt.Sprintf("$KV.ac-1.sha256.%s.%d", action.Hash(), action.Size()), value); err != nil {
		t.Fatalf("Publish: %v", err)
	}
}

// heap is how much memory is in use.
func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A result that has lost a blob is no hit: the action is executed.
func TestEXA_13_IncompleteResultIsNoHit(t *testing.T) {
	h := start(t)
	q := h.queue(t)
	action, result := h.action(t), h.result(t)
	result.OutputFiles[0].Digest = absent().Proto()
	h.entry(t, action, result)
	stream := h.execute(t.Context(), t, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	settle(t, begin(t, q), &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: 5}})
	if got, _ := finish(t, stream, action); got.GetCachedResult() || got.GetResult().GetExitCode() != 5 {
		t.Errorf("response %v, want the worker's", got)
	}
}
