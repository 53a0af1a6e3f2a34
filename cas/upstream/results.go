package upstream

import (
	"context"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Result returns what the upstream's action cache has; cas.ErrNotFound is that it has nothing.
func (c *Client) Result(ctx context.Context, action digest.Digest) (*repb.ActionResult, error) {
	if _, err := c.can(action); err != nil {
		return nil, err
	}
	there, err := c.spaceThere(action.Space())
	if err != nil {
		return nil, err
	}
	var result *repb.ActionResult
	err = c.call(ctx, "GetActionResult", func(ctx context.Context) (err error) {
		result, err = c.results.GetActionResult(ctx, &repb.GetActionResultRequest{
			InstanceName: there.Instance(), DigestFunction: action.Space().Function().Proto(), ActionDigest: action.Proto(),
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the result of %v: %w", action, err)
	}
	return result, nil
}

// canUpdate tells whether results of action may be offered.
func (c *Client) canUpdate(action digest.Digest) error {
	can, err := c.can(action)
	if err == nil && (!can.updates || c.noResults.Load()) {
		err = fmt.Errorf("%w: it takes no action results", ErrRefused)
	}
	return err
}

// Update stores a result in the upstream's action cache, which must have the blobs.
func (c *Client) Update(ctx context.Context, action digest.Digest, result *repb.ActionResult) error {
	if err := c.canUpdate(action); err != nil {
		return err
	}
	there, err := c.spaceThere(action.Space())
	if err != nil {
		return err
	}
	err = c.call(ctx, "UpdateActionResult", func(ctx context.Context) error {
		_, err := c.results.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{
			InstanceName: there.Instance(), DigestFunction: action.Space().Function().Proto(),
			ActionDigest: action.Proto(), ActionResult: proto.CloneOf(result),
		})
		return err
	})
	if err != nil {
		err = c.forbidden(ctx, &c.noResults, "action results", err)
		return fmt.Errorf("storing the result of %v: %w", action, err)
	}
	return nil
}
