package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Actions is the farm's own action cache with that of an upstream behind it. NewActions makes one, Run
// must go on while it is used.
type Actions struct {
	local   actioncache.Results
	tier    *Tier
	client  *Client
	updates *queue

	adoptions chan *adoption
	mu        sync.Mutex             // guards adopting
	adopting  map[digest.Digest]bool // actions whose results are being adopted
}

var _ actioncache.Results = (*Actions)(nil)

// What of the upstream's results may be on its way at once. A result beyond it is a miss, since the
// farm must not promise what it may never get.
const (
	maxAdoptions = 256
	maxPromised  = 100_000
)

// NewActions returns an action cache on one whose blobs are those of the tier. It starts nothing.
func NewActions(local actioncache.Results, tier *Tier) *Actions {
	a := &Actions{
		local: local, tier: tier, client: tier.client, updates: newQueue("action", tier.client),
		adoptions: make(chan *adoption, maxAdoptions), adopting: make(map[digest.Digest]bool),
	}
	queued(tier.client.cfg.Registerer, "action", a.updates.length)
	return a
}

// How many results are adopted and copied at once.
const (
	adopters = 4
	updaters = 2
)

// Run adopts and copies results until ctx ends. What waits to be copied then is copied within the bound
// on draining.
func (a *Actions) Run(ctx context.Context) error {
	var group errgroup.Group
	for range adopters {
		group.Go(func() error {
			for {
				select {
				case found := <-a.adoptions:
					a.adopt(ctx, found)
				case <-ctx.Done():
					return nil
				}
			}
		})
	}
	for range updaters {
		group.Go(func() error {
			return drained(ctx, a.client.cfg.Drain, func(ctx context.Context, closing <-chan struct{}) {
				for {
					action, ok := a.updates.next(closing)
					if !ok {
						return
					}
					a.updates.count(outcome(a.copy(ctx, action)), 1)
				}
			})
		})
	}
	return group.Wait()
}

// Get implements actioncache.Results. A result of the upstream is returned when every blob that it names
// is here or there; those that are only there are fetched from then on. An upstream that fails is a
// miss: the action is executed, which is always right.
func (a *Actions) Get(ctx context.Context, action digest.Digest) (*repb.ActionResult, error) {
	result, miss := a.local.Get(ctx, action)
	if miss == nil || !errors.Is(miss, actioncache.ErrNotFound) {
		return result, miss
	}
	result, err := a.find(ctx, action)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	a.client.metrics.lookups.WithLabelValues(lookup(err)).Inc()
	if err != nil {
		a.client.cfg.Log.DebugContext(ctx, "upstream cache has no result", "action", action, "err", err)
		return nil, miss
	}
	return result, nil
}

func lookup(err error) string {
	switch {
	case err == nil:
		return "hit"
	case errors.Is(err, cas.ErrNotFound):
		return "miss"
	case errors.As(err, new(*actioncache.MissingError)):
		return "incomplete"
	case errors.Is(err, actioncache.ErrInvalid), errors.Is(err, actioncache.ErrTooLarge):
		return "invalid"
	case errors.Is(err, errBusy):
		return "busy"
	}
	return outcome(err)
}

var errBusy = errors.New("too much of the upstream cache is on its way")

// find returns a complete result of the upstream.
func (a *Actions) find(ctx context.Context, action digest.Digest) (*repb.ActionResult, error) {
	result, err := a.client.Result(ctx, action)
	if err != nil {
		return nil, err
	}
	if err := actioncache.Strip(ctx, a.tier.local, action.Space(), result); err != nil {
		return nil, err
	}
	both := &arriving{tier: a.tier}
	if err := actioncache.Complete(ctx, both, action.Space(), result); err != nil {
		return nil, err
	}
	if err := a.promise(&adoption{action: action, result: proto.CloneOf(result), wanted: both.wanted}); err != nil {
		return nil, err
	}
	return result, nil
}

// arriving is the blobs of the farm and those of the upstream, of which it remembers the latter.
type arriving struct {
	tier   *Tier
	wanted []digest.Digest
}

// Open implements cas.Store.
func (s *arriving) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	return s.tier.Open(ctx, d, offset)
}

// Put implements cas.Store.
func (s *arriving) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return s.tier.local.Put(ctx, d, r)
}

// Missing implements cas.Store.
func (s *arriving) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	absent, err := cas.Confirm(ctx, s.tier.local, ds)
	if err != nil || len(absent) == 0 {
		return nil, err
	}
	if len(s.wanted)+len(absent) > maxPromised {
		return nil, errBusy
	}
	missing, err := s.tier.client.Missing(ctx, absent)
	if err != nil || len(missing) > 0 {
		return missing, err // The result is a miss, whatever else it names.
	}
	s.wanted = append(s.wanted, absent...)
	return nil, nil
}

// adoption is a result of the upstream that becomes one of the farm.
type adoption struct {
	action digest.Digest
	result *repb.ActionResult
	wanted []digest.Digest // what the farm does not have
}

// promise queues an adoption and lets questions for its blobs wait for them.
func (a *Actions) promise(found *adoption) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.adopting[found.action] {
		return nil // Somebody else has asked for the same.
	}
	if !a.tier.promise(found.wanted) {
		return errBusy
	}
	select {
	case a.adoptions <- found:
	default:
		for _, d := range found.wanted {
			a.tier.kept(d)
		}
		return errBusy
	}
	a.adopting[found.action] = true
	return nil
}

// adopt fetches what the farm lacks of a result and stores it.
func (a *Actions) adopt(ctx context.Context, found *adoption) {
	var group errgroup.Group
	group.SetLimit(arrivals)
	errs := make([]error, len(found.wanted))
	for i, d := range found.wanted {
		group.Go(func() error {
			defer a.tier.kept(d)
			errs[i] = a.tier.ensure(ctx, d)
			return nil
		})
	}
	err := group.Wait()
	if first := slices.IndexFunc(errs, func(err error) bool { return err != nil }); first >= 0 {
		err = errs[first]
	}
	if err == nil {
		err = a.local.Put(ctx, found.action, found.result)
	}
	if err != nil && ctx.Err() == nil {
		a.client.cfg.Log.WarnContext(ctx, "result of the upstream cache cannot be kept", "action", found.action, "err", err)
	}
	a.mu.Lock()
	delete(a.adopting, found.action)
	a.mu.Unlock()
}

// Put implements actioncache.Results: the result is stored here, and copied to the upstream later.
func (a *Actions) Put(ctx context.Context, action digest.Digest, result *repb.ActionResult) error {
	err := a.local.Put(ctx, action, result)
	if err == nil {
		a.Executed(action)
	}
	return err
}

// Executed queues the result that the farm's own cache has of an action, if it has one, to be copied
// to the upstream after its blobs. It does not wait.
func (a *Actions) Executed(action digest.Digest) {
	if err := a.client.canUpdate(action); err != nil {
		a.updates.count(outcome(err), 1)
		return
	}
	a.updates.offer(action)
}

// copy brings a result to the upstream.
func (a *Actions) copy(ctx context.Context, action digest.Digest) error {
	if err := a.client.canUpdate(action); err != nil {
		return err
	}
	result, err := a.local.Get(ctx, action)
	if errors.Is(err, actioncache.ErrNotFound) {
		return fmt.Errorf("%w: %w", cas.ErrNotFound, err)
	}
	if err != nil {
		return err
	}
	// Caches that check results want the action and its command as well.
	a.tier.copy(ctx, append(a.command(ctx, action), action))
	if err := actioncache.Complete(ctx, &leaving{a.tier}, action.Space(), result); err != nil {
		return err
	}
	return a.client.Update(ctx, action, result)
}

// command is the Command of an action, if the farm has that.
func (a *Actions) command(ctx context.Context, action digest.Digest) []digest.Digest {
	const most = 1 << 20
	message := new(repb.Action)
	data, err := cas.ReadAll(ctx, a.tier.local, action, most)
	if err != nil || proto.Unmarshal(data, message) != nil {
		return nil
	}
	command, err := action.Space().Parse(message.GetCommandDigest())
	if err != nil {
		return nil
	}
	return []digest.Digest{command}
}

// leaving is the farm's blobs, of which those that are asked for are brought to the upstream: what is
// missing is what could not be brought.
type leaving struct{ tier *Tier }

// Open implements cas.Store.
func (s *leaving) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	return s.tier.local.Open(ctx, d, offset)
}

// Put implements cas.Store.
func (s *leaving) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return s.tier.local.Put(ctx, d, r)
}

// Missing implements cas.Store.
func (s *leaving) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	left := s.tier.copy(ctx, ds)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return left, nil
}
