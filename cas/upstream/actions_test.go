package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/upstream"
	"github.com/jetfarm/jetfarm/frontend"
)

// pair is a farm with another one behind it, whose blobs are behind a gate.
type pair struct {
	*upstream.Actions
	tier    *upstream.Tier
	front   *storage
	back    *farm
	gate    *gate
	proxy   *proxy
	client  *upstream.Client
	metrics *prometheus.Registry
	stop    func()
}

func startPair(t testing.TB, changes ...func(*frontend.Config)) *pair {
	t.Helper()
	x := &pair{front: newStorage(t), metrics: prometheus.NewRegistry()}
	changes = append(changes, func(cfg *frontend.Config) {
		x.gate = newGate(cfg.Blobs, 1<<30)
		cfg.Blobs = x.gate
	})
	x.back = startFarm(t, changes...)
	x.proxy = newProxy(t, x.back.address)
	x.client = connect(t, x.proxy.address(), func(cfg *upstream.Config) { cfg.Registerer = x.metrics })
	x.tier = upstream.New(x.front.blobs, x.client)
	x.Actions = upstream.NewActions(x.front.actions, x.tier)
	stopTier, stopActions := run(t, x.tier.Run), run(t, x.Run)
	x.stop = func() {
		stopActions()
		stopTier()
	}
	return x
}

// built is an action with a result, and the blobs that it names.
type built struct {
	action digest.Digest
	result *repb.ActionResult
	blobs  []digest.Digest
}

// build stores an action with a command and a result with a file, a directory and outputs in a store.
func build(t testing.TB, s cas.Store) *built {
	t.Helper()
	b := &built{}
	message := func(m proto.Message) digest.Digest {
		return put(t, s, must(proto.MarshalOptions{Deterministic: true}.Marshal(m)))
	}
	command := message(&repb.Command{Arguments: []string{"make", fmt.Sprintf("%x", random(8))}})
	b.action = message(&repb.Action{CommandDigest: command.Proto()})
	file, _ := add(t, s, 1000)
	large, _ := add(t, s, 700<<10)
	inner, _ := add(t, s, 500)
	stdout, _ := add(t, s, 30)
	tree := message(&repb.Tree{Root: &repb.Directory{Files: []*repb.FileNode{{Name: "inner", Digest: inner.Proto()}}}})
	b.blobs = []digest.Digest{file, large, inner, stdout, tree}
	b.result = &repb.ActionResult{
		OutputFiles:       []*repb.OutputFile{{Path: "file", Digest: file.Proto()}, {Path: "large", Digest: large.Proto()}},
		OutputDirectories: []*repb.OutputDirectory{{Path: "dir", TreeDigest: tree.Proto()}},
		StdoutDigest:      stdout.Proto(),
	}
	return b
}

func wantResult(t testing.TB, got *repb.ActionResult, err error, want *repb.ActionResult) {
	t.Helper()
	if err != nil {
		t.Fatalf("no result: %v", err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Fatalf("result (-want +got):\n%s", diff)
	}
}

func (x *pair) lookups(t testing.TB, result string) float64 {
	t.Helper()
	return values(t, x.metrics)["jetfarm_upstream_action_cache_lookups_total "+result]
}

func TestResultsAreReadThrough(t *testing.T) {
	t.Run("and kept with their blobs", func(t *testing.T) {
		x := startPair(t)
		b := build(t, x.back.blobs)
		if err := x.back.actions.Put(t.Context(), b.action, b.result); err != nil {
			t.Fatal(err)
		}
		got, err := x.Get(t.Context(), b.action)
		wantResult(t, got, err, b.result)
		eventually(t, "the result in the farm's own cache", func() bool {
			_, err := x.front.actions.Get(t.Context(), b.action)
			return err == nil
		})
		if missing, err := x.front.blobs.Missing(t.Context(), b.blobs); err != nil || len(missing) > 0 {
			t.Errorf("missing here: %v, error %v", missing, err)
		}
		if n := x.tier.Promised(); n != 0 {
			t.Errorf("%d blobs are still promised", n)
		}
		x.proxy.refusing.Store(true)
		x.proxy.cut()
		got, err = x.Get(t.Context(), b.action)
		wantResult(t, got, err, b.result)
	})
	t.Run("with what is on its way being present", func(t *testing.T) {
		x := startPair(t)
		b := build(t, x.back.blobs)
		if err := x.back.actions.Put(t.Context(), b.action, b.result); err != nil {
			t.Fatal(err)
		}
		// Open for the tree, which is read for the answer, and closed for the large file.
		x.gate.after = 600 << 10
		got, err := x.Get(t.Context(), b.action)
		wantResult(t, got, err, b.result)
		var asking sync.WaitGroup
		for name, ask := range map[string]func(context.Context, []digest.Digest) ([]digest.Digest, error){"Missing": x.tier.Missing, "Confirm": x.tier.Confirm} {
			asking.Go(func() {
				stranger := space.Of([]byte("nobody has this"))
				missing, err := ask(t.Context(), append(b.blobs, stranger))
				if err != nil || len(missing) != 1 || missing[0] != stranger {
					t.Errorf("%s = %v, %v; want only what nobody has", name, missing, err)
				}
			})
		}
		x.gate.open()
		asking.Wait()
	})
	t.Run("with bytes in them", func(t *testing.T) {
		text := []byte("inlined")
		s := &script{
			result: func(*repb.GetActionResultRequest) (*repb.ActionResult, error) {
				return &repb.ActionResult{StdoutRaw: text, OutputFiles: []*repb.OutputFile{{Path: "f", Contents: text, Digest: space.Of(text).Proto()}}}, nil
			},
		}
		front := newStorage(t)
		s2 := upstream.New(front.blobs, connect(t, startScript(t, s)))
		run(t, s2.Run)
		a := upstream.NewActions(front.actions, s2)
		run(t, a.Run)
		got, err := a.Get(t.Context(), space.Of([]byte("action")))
		d := space.Of(text).Proto()
		wantResult(t, got, err, &repb.ActionResult{StdoutDigest: d, OutputFiles: []*repb.OutputFile{{Path: "f", Digest: d}}})
		wantBlob(t, front.blobs, space.Of(text), text)
	})
}

// results is an action cache that believes everything.
type results map[digest.Digest]*repb.ActionResult

func (r results) Get(_ context.Context, action digest.Digest) (*repb.ActionResult, error) {
	if result := r[action]; result != nil {
		return proto.CloneOf(result), nil
	}
	return nil, actioncache.ErrNotFound
}

func (results) Put(context.Context, digest.Digest, *repb.ActionResult) error {
	return errors.New("read only")
}

func TestResultsThatAreMisses(t *testing.T) {
	all := make(results)
	x := startPair(t, func(cfg *frontend.Config) { cfg.Actions = all })
	b := build(t, x.back.blobs)
	absent := space.Of([]byte("nobody has this"))
	incomplete, invalid, noTree := proto.CloneOf(b.result), proto.CloneOf(b.result), proto.CloneOf(b.result)
	incomplete.OutputFiles[0].Digest = absent.Proto()
	invalid.OutputFiles[0].Path = "/absolute"
	noTree.OutputDirectories[0].TreeDigest = absent.Proto()
	for name, result := range map[string]*repb.ActionResult{"incomplete": incomplete, "invalid": invalid, "no tree": noTree, "none": nil} {
		action := space.Of([]byte(name))
		all[action] = result
		if result == nil {
			delete(all, action)
		}
		if _, err := x.Get(t.Context(), action); !errors.Is(err, actioncache.ErrNotFound) {
			t.Errorf("%s: error %v, want ErrNotFound", name, err)
		}
	}
	if x.lookups(t, "incomplete") != 2 || x.lookups(t, "invalid") != 1 || x.lookups(t, "miss") != 1 {
		t.Errorf("lookups: %v", values(t, x.metrics))
	}
	if n := x.tier.Promised(); n != 0 {
		t.Errorf("%d blobs are promised", n)
	}
	x.proxy.refusing.Store(true)
	x.proxy.cut()
	all[b.action] = b.result
	for range 10 {
		if _, err := x.Get(t.Context(), b.action); !errors.Is(err, actioncache.ErrNotFound) {
			t.Errorf("an upstream that is gone: error %v, want ErrNotFound", err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errStop)
	_, err := x.Get(ctx, b.action)
	wantError(t, "Get with a done context", err, errStop)
}

func TestResultsAreWrittenThrough(t *testing.T) {
	arrived := func(t *testing.T, x *pair, b *built) {
		t.Helper()
		// The other farm takes results only with all of their blobs, the action and the command.
		eventually(t, "the result at the upstream", func() bool {
			_, err := x.back.actions.Get(t.Context(), b.action)
			return err == nil
		})
		got, err := x.back.actions.Get(t.Context(), b.action)
		wantResult(t, got, err, b.result)
	}
	t.Run("when a client stores them", func(t *testing.T) {
		x := startPair(t)
		b := build(t, x.front.blobs)
		if err := x.Put(t.Context(), b.action, b.result); err != nil {
			t.Fatal(err)
		}
		arrived(t, x, b)
	})
	t.Run("when they were executed", func(t *testing.T) {
		x := startPair(t)
		b := build(t, x.front.blobs)
		if err := x.front.actions.Put(t.Context(), b.action, b.result); err != nil {
			t.Fatal(err)
		}
		x.Executed(space.Of([]byte("an action without a result")))
		x.Executed(b.action)
		arrived(t, x, b)
		if n := values(t, x.metrics)["jetfarm_upstream_copies_total action absent"]; n != 1 {
			t.Errorf("%v actions without a result were counted, want 1", n)
		}
	})
	t.Run("when the process ends", func(t *testing.T) {
		x := startPair(t)
		b := build(t, x.front.blobs)
		if err := x.Put(t.Context(), b.action, b.result); err != nil {
			t.Fatal(err)
		}
		x.stop()
		got, err := x.back.actions.Get(t.Context(), b.action)
		wantResult(t, got, err, b.result)
	})
	t.Run("unless the upstream takes none", func(t *testing.T) {
		x := startPair(t, func(cfg *frontend.Config) { cfg.AllowActionCacheUpdates = false })
		b := build(t, x.front.blobs)
		if err := x.Put(t.Context(), b.action, b.result); err != nil {
			t.Fatal(err)
		}
		x.stop()
		sums := values(t, x.metrics)
		if sums["jetfarm_upstream_copies_total action refused"] != 1 {
			t.Errorf("copies: %v", sums)
		}
		if missing, err := x.back.blobs.Missing(t.Context(), b.blobs); err != nil || len(missing) != len(b.blobs) {
			t.Errorf("blobs were brought for a result that is not taken: %v, %v", missing, err)
		}
	})
}
