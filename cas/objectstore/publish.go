package objectstore

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
)

// maxPending is more than the write budget of any stream lets through, so that the client never
// waits on its own.
const maxPending = 1 << 20

// publisher sends messages to JetStream without waiting, each with an acknowledgement to wait for.
type publisher struct {
	js jetstream.JetStream
	// options keep the client from sending a message again by itself: that would reorder chunks and
	// read a payload after publish has returned.
	options []jetstream.PublishOpt
}

// newPublisher returns a publisher whose acknowledgements fail after timeout.
func newPublisher(conn *nats.Conn, timeout time.Duration) (publisher, error) {
	js, err := jetstream.New(conn,
		jetstream.WithPublishAsyncMaxPending(maxPending),
		jetstream.WithPublishAsyncTimeout(timeout))
	return publisher{js: js, options: []jetstream.PublishOpt{jetstream.WithRetryAttempts(0)}}, err
}

// publish sends a message and does not keep data.
func (p publisher) publish(ctx context.Context, subject string, header nats.Header, data []byte) (*ack, error) {
	if ctx.Err() != nil {
		return nil, ended(ctx)
	}
	f, err := p.js.PublishMsgAsync(&nats.Msg{Subject: subject, Header: header, Data: data}, p.options...)
	if err != nil {
		return nil, brokerError(ctx, err)
	}
	return &ack{future: f}, nil
}

// expect returns a header that makes the broker refuse a message, with errExists, unless the last
// one of its subject has this sequence; 0 is none.
func expect(sequence uint64) nats.Header {
	return nats.Header{jetstream.ExpectedLastSubjSeqHeader: {strconv.FormatUint(sequence, 10)}}
}

// ack is the broker's answer to one publish, which may be yet to come. It belongs to one goroutine.
type ack struct {
	future   jetstream.PubAckFuture
	answered bool
	sequence uint64
	err      error
}

// wait returns the sequence under which the message is stored. Errors are those of brokerError. It
// may be called again; only an answer is final.
func (a *ack) wait(ctx context.Context) (uint64, error) {
	if a.answered {
		return a.sequence, a.err
	}
	select {
	case m := <-a.future.Ok():
		a.answered, a.sequence = true, m.Sequence
	case err := <-a.future.Err():
		a.answered, a.err = true, refusalError(err)
	case <-ctx.Done():
		return 0, ended(ctx)
	}
	return a.sequence, a.err
}

// waitFor is wait with a bound of its own, after which the error wraps cas.ErrUnavailable.
func (a *ack) waitFor(ctx context.Context, timeout time.Duration) (uint64, error) {
	bounded, cancel := context.WithTimeoutCause(ctx, timeout, errTimeout)
	defer cancel()
	sequence, err := a.wait(bounded)
	if !a.answered && ctx.Err() == nil {
		err = fmt.Errorf("%w: no acknowledgement within %v", cas.ErrUnavailable, timeout)
	}
	return sequence, err
}
