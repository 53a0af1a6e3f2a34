package upstream

import (
	"context"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas/digest"
)

const (
	// maxAsked is how many digests one question has: far below 4 MiB in every digest function.
	maxAsked = 10_000
	// questions is how many parts of one question are asked at once.
	questions = 4
)

// Missing implements cas.Store. What the upstream cannot have for its lack of the digest function is
// missing.
func (c *Client) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	can, err := c.health.able()
	if err != nil {
		return nil, err
	}
	state := make(map[digest.Digest]bool, len(ds)) // whether it is missing
	asked := make(map[digest.Space][]digest.Digest)
	for _, d := range ds {
		if _, twice := state[d]; twice {
			continue
		}
		unknown := !d.IsEmpty() && !d.IsImpossible() && can.functions[d.Space().Function()]
		state[d] = !d.IsEmpty()
		if unknown {
			asked[d.Space()] = append(asked[d.Space()], d)
		}
	}
	if err := c.ask(ctx, asked, state); err != nil {
		return nil, err
	}
	var missing []digest.Digest
	for _, d := range ds {
		if state[d] {
			missing = append(missing, d)
			state[d] = false // once is enough
		}
	}
	return missing, nil
}

// ask sets the state of every digest that is asked.
func (c *Client) ask(ctx context.Context, asked map[digest.Space][]digest.Digest, state map[digest.Digest]bool) error {
	type part struct {
		space   digest.Space
		ds      []digest.Digest
		missing []digest.Digest
	}
	var parts []*part
	for space, ds := range asked {
		for len(ds) > 0 {
			n := min(len(ds), maxAsked)
			parts = append(parts, &part{space: space, ds: ds[:n]})
			ds = ds[n:]
		}
	}
	// Not its context: one part that fails is known to be the reason.
	var group errgroup.Group
	group.SetLimit(questions)
	for _, p := range parts {
		group.Go(func() (err error) {
			p.missing, err = c.findMissing(ctx, p.space, p.ds)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, p := range parts {
		for _, d := range p.ds {
			state[d] = false
		}
		for _, d := range p.missing {
			state[d] = true
		}
	}
	return nil
}

// findMissing asks for digests of one space.
func (c *Client) findMissing(ctx context.Context, space digest.Space, ds []digest.Digest) ([]digest.Digest, error) {
	there, err := c.spaceThere(space)
	if err != nil {
		return ds, nil //nolint:nilerr // an instance that the upstream cannot have has nothing there
	}
	request := &repb.FindMissingBlobsRequest{
		InstanceName: there.Instance(), DigestFunction: space.Function().Proto(), BlobDigests: make([]*repb.Digest, len(ds)),
	}
	for i, d := range ds {
		request.BlobDigests[i] = d.Proto()
	}
	var answer *repb.FindMissingBlobsResponse
	err = c.call(ctx, "FindMissingBlobs", func(ctx context.Context) (err error) {
		answer, err = c.blobs.FindMissingBlobs(ctx, request)
		return err
	})
	if err != nil {
		return nil, err
	}
	missing := make([]digest.Digest, 0, len(answer.GetMissingBlobDigests()))
	for _, m := range answer.GetMissingBlobDigests() {
		// What was not asked says nothing.
		if d, err := space.Parse(m); err == nil {
			missing = append(missing, d)
		}
	}
	return missing, nil
}
