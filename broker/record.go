package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// settleBound is how long a step that must be finished may go on after its caller has left.
const settleBound = 10 * time.Second

// errConflict reports a compare-and-set that found another sequence.
var errConflict = errors.New("wrong last sequence")

// read returns the record of an operation and its revision. The error wraps ErrNotFound.
func (c *Client) read(ctx context.Context, operation string) (*record, uint64, error) {
	r, msg, err := c.stored(ctx, operation)
	if err != nil {
		return nil, 0, err
	}
	return r, msg.Sequence, nil
}

// stored is read with the message that has the record.
func (c *Client) stored(ctx context.Context, operation string) (*record, *jetstream.RawStreamMsg, error) {
	if !validName(operation) {
		return nil, nil, fmt.Errorf("%w: %.64q", ErrNotFound, operation)
	}
	msg, err := c.last(ctx, c.operations, operationSubject+operation)
	if err != nil {
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, nil, fmt.Errorf("%w: %s", ErrNotFound, operation)
		}
		return nil, nil, fmt.Errorf("read operation %s: %w", operation, err)
	}
	r, err := decodeRecord(msg.Data)
	if err != nil {
		return nil, nil, fmt.Errorf("operation %s: %w", operation, err)
	}
	r.stored = msg.Time
	return r, msg, nil
}

// last returns the last message of a subject, or jetstream.ErrMsgNotFound.
func (c *Client) last(ctx context.Context, s jetstream.Stream, subject string) (*jetstream.RawStreamMsg, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	msg, err := s.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, nats.ErrNoResponders) {
		// The stream has changed what kinds of reads it allows, as it does with its number of replicas.
		if fresh, again := c.js.Stream(ctx, s.CachedInfo().Config.Name); again == nil {
			msg, err = fresh.GetLastMsgForSubject(ctx, subject)
		}
	}
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, unavailable(cause(ctx, err))
	}
	return msg, err
}

// write stores r as the successor of revision (0 for a new operation) and returns its own revision.
// It returns errConflict when the operation has moved on, in which case nothing was stored.
func (c *Client) write(ctx context.Context, r *record, revision uint64) (uint64, error) {
	r.Updated = time.Now().UTC()
	payload, err := r.encode()
	if err != nil {
		return 0, err
	}
	msg := &nats.Msg{Subject: operationSubject + r.Operation, Data: payload}
	keep := abandonedAfter
	if r.done() {
		keep = retention
	}
	return c.publish(ctx, msg, jetstream.WithExpectLastSequencePerSubject(revision), jetstream.WithMsgTTL(keep))
}

// publish stores one message and returns its sequence.
func (c *Client) publish(ctx context.Context, msg *nats.Msg, options ...jetstream.PublishOpt) (uint64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	ack, err := c.js.PublishMsg(ctx, msg, options...)
	if err == nil {
		return ack.Sequence, nil
	}
	if api, ok := errors.AsType[*jetstream.APIError](err); ok {
		switch api.ErrorCode {
		case jetstream.JSErrCodeStreamWrongLastSequence, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
			return 0, errConflict
		case storeFailed:
			return 0, fmt.Errorf("%w: %s", errStoreFailed, api.Description)
		default:
		}
	}
	return 0, unavailable(cause(ctx, err))
}

// storeFailed is the server's code for a message that a stream's limits refuse.
const storeFailed jetstream.ErrorCode = 10077

var errStoreFailed = errors.New("stream limit reached")

// update changes the record of an operation by compare-and-set. change gets the current record and
// may refuse with an error, which update returns; it is called again when another writer was first,
// also when that writer was an earlier try of this call whose answer was lost.
func (c *Client) update(ctx context.Context, operation string, change func(*record) error) (*record, uint64, error) {
	for attempt := 0; ; attempt++ {
		r, revision, err := c.read(ctx, operation)
		if err == nil {
			if err := change(r); err != nil {
				return r, revision, err
			}
			if revision, err = c.write(ctx, r, revision); err == nil {
				return r, revision, nil
			}
		}
		if !errors.Is(err, errConflict) && !errors.Is(err, ErrUnavailable) {
			return nil, 0, err
		}
		if attempt >= maxTries {
			return nil, 0, fmt.Errorf("%w: operation %s could not be updated: %w", ErrUnavailable, operation, err)
		}
		if err := pause(ctx, attempt); err != nil {
			return nil, 0, err
		}
	}
}

// maxTries bounds the repetitions of a step that races with others or meets a broker that is moving.
const maxTries = 8

// cause prefers the reason why ctx ended over the library's words for it, unless a deadline of our
// own ended it.
func cause(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	if c := context.Cause(ctx); !errors.Is(err, c) {
		return c
	}
	return err
}
