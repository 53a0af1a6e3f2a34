package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"
)

// The bounds of the stream of dead letters; the oldest give way.
const (
	maxLetters     = 10_000
	maxLetterBytes = 64 << 20
	letterTTL      = 7 * 24 * time.Hour
)

// errExhausted is returned by a change that finds no attempt left.
var errExhausted = errors.New("no attempt is left")

// bury ends an operation whose attempts are used up; r has them all. A letter that says so is kept for
// the operator. It is stored first: whoever finds an operation with a letter that has not ended does
// all this again, and there is one letter for each. ErrLost says that the operation ended otherwise or
// goes on.
func (c *Client) bury(ctx context.Context, r *record, message string) error {
	attempt := r.Attempt
	r.finish(code.Code_UNAVAILABLE, message)
	letter, err := c.sendLetter(ctx, r)
	if err != nil {
		// An end without a letter is better than none.
		c.log.ErrorContext(ctx, "dead letter not stored", "operation", r.Operation, "err", err)
	}
	ended, _, err := c.update(ctx, r.Operation, func(now *record) error {
		switch {
		case now.done() && bytes.Equal(now.response, r.response):
			return errUnchanged // an earlier try, or the one of another process
		case now.done() || now.Attempt != attempt:
			return ErrLost
		}
		now.finish(code.Code_UNAVAILABLE, message)
		now.Failures = r.Failures
		return nil
	})
	switch {
	case err == nil || errors.Is(err, errUnchanged):
		c.metrics.dead.Inc()
		c.log.WarnContext(ctx, "operation set aside", "operation", r.Operation, "err", message)
		c.releaseFlight(ctx, ended)
		return nil
	case errors.Is(err, ErrLost) && letter > 0:
		if buried := ended.done() && ended.exhausted(); !buried { // else it is that one's letter, too
			c.removeLetter(ctx, letter)
		}
	}
	return err
}

// buryExhausted is bury for an operation whose last attempt has failed.
func (c *Client) buryExhausted(ctx context.Context, r *record) error {
	return c.bury(ctx, r, r.epitaph())
}

func (c *Client) sendLetter(ctx context.Context, r *record) (sequence uint64, err error) {
	payload, err := r.encode()
	if err != nil {
		return 0, err
	}
	for attempt := 0; ; attempt++ {
		sequence, err := c.publish(ctx, &nats.Msg{Subject: deadSubject + r.Operation, Data: payload})
		if err == nil || attempt >= maxTries {
			return sequence, err
		}
		if err := pause(ctx, attempt); err != nil {
			return 0, err
		}
	}
}

func (c *Client) removeLetter(ctx context.Context, sequence uint64) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	if err := c.dead.DeleteMsg(ctx, sequence); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) && !isGone(err) {
		c.log.WarnContext(ctx, "remove dead letter", "err", err)
	}
}

// Dead returns up to limit operations that were set aside because all their attempts failed, the oldest
// first, and whether there are more. They are kept for longer than others.
func (c *Client) Dead(ctx context.Context, limit int) (ops []*Operation, more bool, err error) {
	for sequence := uint64(1); ; {
		msg, err := c.following(ctx, c.dead, sequence, deadSubject+"*")
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return ops, false, nil
		}
		if err != nil {
			return nil, false, err
		}
		if len(ops) == limit {
			return ops, true, nil
		}
		sequence = msg.Sequence + 1
		r, err := decodeRecord(msg.Data)
		if err == nil {
			var op *Operation
			if op, err = r.snapshot(msg.Sequence); err == nil {
				ops = append(ops, op)
			}
		}
		if err != nil {
			c.log.WarnContext(ctx, "unreadable dead letter", "subject", msg.Subject, "err", err)
		}
	}
}

// Retry submits the action of a dead letter again and removes the letter. The new operation need not
// be watched. The error wraps ErrNotFound when there is no letter of that operation, or is Submit's, in
// which case the letter stays.
func (c *Client) Retry(ctx context.Context, operation string) (name string, err error) {
	operation = OperationOf(operation)
	if !validName(operation) {
		return "", fmt.Errorf("%w: %.64q", ErrNotFound, operation)
	}
	msg, err := c.last(ctx, c.dead, deadSubject+operation)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return "", fmt.Errorf("%w: %s has no dead letter", ErrNotFound, operation)
	}
	if err != nil {
		return "", err
	}
	r, err := decodeRecord(msg.Data)
	if err != nil {
		return "", err
	}
	action, err := r.Action.digest()
	if err != nil {
		return "", err
	}
	metadata := new(repb.RequestMetadata)
	if proto.Unmarshal(r.Metadata, metadata) != nil {
		metadata = nil
	}
	name, err = c.Submit(ctx, Request{
		Action: action, Platform: r.Platform, Priority: r.Priority, SkipCacheLookup: r.SkipCacheLookup,
		DoNotCache: r.DoNotCache, Metadata: metadata, Unattended: true,
	})
	if err != nil {
		return "", err
	}
	c.removeLetter(ctx, msg.Sequence)
	return name, nil
}
