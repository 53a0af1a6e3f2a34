package broker

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
)

// MaxList is the most operations that List returns at once.
const MaxList = 500

// List returns up to limit operations without their responses, oldest change first, and the token of the next page, which is
// "" after the last. The error wraps ErrInvalid for a token that List did not give.
func (c *Client) List(ctx context.Context, limit int, token string) (ops []*Operation, next string, err error) {
	sequence := uint64(1)
	if token != "" {
		if sequence, err = strconv.ParseUint(token, 10, 64); err != nil || sequence == 0 {
			return nil, "", fmt.Errorf("%w: page token %.64q was not given by this service", ErrInvalid, token)
		}
	}
	for limit = min(max(limit, 1), MaxList); limit > 0; limit-- {
		msg, err := c.after(ctx, sequence)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return ops, "", nil
		}
		if err != nil {
			return nil, "", err
		}
		sequence = msg.Sequence + 1
		r, err := decodeRecord(msg.Data)
		if err != nil {
			c.log.WarnContext(ctx, "unreadable operation", "sequence", msg.Sequence, "err", err)
			continue
		}
		op, err := r.snapshot(msg.Sequence)
		if err != nil {
			return nil, "", err
		}
		op.Response = nil // up to MaxResponse bytes, which nobody asks a list for
		ops = append(ops, op)
	}
	if _, err := c.after(ctx, sequence); errors.Is(err, jetstream.ErrMsgNotFound) {
		return ops, "", nil
	}
	return ops, strconv.FormatUint(sequence, 10), nil
}

// after returns the first record at or after a sequence.
func (c *Client) after(ctx context.Context, sequence uint64) (*jetstream.RawStreamMsg, error) {
	return c.following(ctx, c.operations, sequence, operationSubject+"*")
}

// following returns the first message at or after a sequence whose subject matches, or
// jetstream.ErrMsgNotFound.
func (c *Client) following(ctx context.Context, s jetstream.Stream, sequence uint64, subject string) (*jetstream.RawStreamMsg, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	msg, err := s.GetMsg(ctx, sequence, jetstream.WithGetMsgSubject(subject))
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, unavailable(cause(ctx, err))
	}
	return msg, err
}

// end makes an operation terminal with a status and no result, unless it is done.
func (c *Client) end(ctx context.Context, operation string, status code.Code, message string) error {
	return c.endIf(ctx, operation, status, message, func(*record) bool { return true })
}

// endIf is end on a condition.
func (c *Client) endIf(ctx context.Context, operation string, status code.Code, message string, condition func(*record) bool) error {
	return c.endBy(ctx, operation, func(r *record) error {
		if r.done() || !condition(r) {
			return errUnchanged
		}
		r.finish(status, message)
		return nil
	})
}

// endBy makes a change that may end an operation, and removes what an ended one leaves.
func (c *Client) endBy(ctx context.Context, operation string, change func(*record) error) error {
	rec, _, err := c.update(ctx, operation, change)
	if errors.Is(err, errUnchanged) {
		return nil
	}
	if err != nil {
		return err
	}
	if !rec.done() {
		return nil
	}
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	c.releaseFlight(ctx, rec)
	// What is not removed is found to be done by the worker that gets it.
	if sequence, held := c.holds.forget(rec); held {
		if err := c.deleteHold(ctx, sequence); err != nil {
			c.log.WarnContext(ctx, "remove held job of an ended operation", "operation", operation, "err", err)
		}
		return nil
	}
	if rec.Holder != "" {
		if err := c.held.Purge(ctx, jetstream.WithPurgeSubject(heldSubjectOf(rec))); err != nil {
			c.log.WarnContext(ctx, "remove held job of an ended operation", "operation", operation, "err", err)
		}
	}
	if err := c.jobs.Purge(ctx, jetstream.WithPurgeSubject(jobSubjectOf(rec))); err != nil {
		c.log.WarnContext(ctx, "remove job of an ended operation", "operation", operation, "err", err)
	}
	return nil
}

// Delete forgets a finished operation, or one that still runs, without cancelling it. It is forgotten for all
// who wait for it.
func (c *Client) Delete(ctx context.Context, name string) error {
	operation := OperationOf(name)
	if _, err := c.Get(ctx, name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	if err := c.operations.Purge(ctx, jetstream.WithPurgeSubject(operationSubject+operation)); err != nil {
		return unavailable(cause(ctx, err))
	}
	return nil
}
