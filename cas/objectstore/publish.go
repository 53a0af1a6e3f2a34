package objectstore

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
)

// publisher sends messages to JetStream without waiting, each with an acknowledgement to wait for.
// All its acknowledgements come to one subscription, which lives as long as the connection. The
// client library's own publisher costs twice as much: a timer and two channels for every message, and
// it may send one again by itself, which would reorder chunks.
type publisher struct {
	conn   *nats.Conn
	js     jetstream.JetStream
	prefix string // of the reply subjects
	// expectNone is expect(0), which nobody changes.
	expectNone nats.Header

	mu      sync.Mutex
	last    uint64          // guarded by mu; the newest key in waiting
	waiting map[uint64]*ack // guarded by mu
}

func newPublisher(conn *nats.Conn) (*publisher, error) {
	js, err := jetstream.New(conn)
	if err != nil {
		return nil, err
	}
	p := &publisher{conn: conn, js: js, prefix: conn.NewInbox() + ".", expectNone: expect(0), waiting: make(map[uint64]*ack)}
	if _, err := conn.Subscribe(p.prefix+"*", p.answer); err != nil {
		return nil, refusalError(err)
	}
	return p, nil
}

// publish sends a message and does not keep data. The ack must be waited for or forgotten.
func (p *publisher) publish(ctx context.Context, subject string, header nats.Header, data []byte) (*ack, error) {
	if ctx.Err() != nil {
		return nil, ended(ctx)
	}
	a := &ack{publisher: p, reconnects: p.conn.Stats().Reconnects, done: make(chan struct{})}
	p.mu.Lock()
	p.last++
	a.id = p.last
	p.waiting[a.id] = a
	p.mu.Unlock()
	m := nats.Msg{Subject: subject, Reply: p.prefix + strconv.FormatUint(a.id, 36), Header: header, Data: data}
	if err := p.conn.PublishMsg(&m); err != nil {
		a.forget()
		return nil, brokerError(ctx, err)
	}
	return a, nil
}

// send is publish without an acknowledgement.
func (p *publisher) send(ctx context.Context, subject string, header nats.Header, data []byte) error {
	if ctx.Err() != nil {
		return ended(ctx)
	}
	return brokerError(ctx, p.conn.PublishMsg(&nats.Msg{Subject: subject, Header: header, Data: data}))
}

// take removes an ack, which is nil if nobody waits for it any more.
func (p *publisher) take(id uint64) *ack {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.waiting[id]
	delete(p.waiting, id)
	return a
}

// answer gives an acknowledgement to its ack.
func (p *publisher) answer(m *nats.Msg) {
	id, err := strconv.ParseUint(strings.TrimPrefix(m.Subject, p.prefix), 36, 64)
	if err != nil {
		return
	}
	if a := p.take(id); a != nil {
		a.sequence, a.err = parseAck(m)
		close(a.done)
	}
}

// parseAck returns the sequence in an acknowledgement or the error that it is.
func parseAck(m *nats.Msg) (uint64, error) {
	if len(m.Data) == 0 && header(m, "Status") == "503" {
		return 0, refusalError(nats.ErrNoResponders)
	}
	if bytes.HasPrefix(m.Data, []byte(`{"stream":`)) {
		_, rest, _ := bytes.Cut(m.Data, []byte(`"seq":`))
		if end := bytes.IndexAny(rest, ",} "); end > 0 {
			if sequence, err := strconv.ParseUint(string(rest[:end]), 10, 64); err == nil && sequence > 0 {
				return sequence, nil
			}
		}
	}
	var answer struct {
		refusal
		Sequence uint64 `json:"seq"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return 0, fmt.Errorf("%w: an acknowledgement that is none: %w", cas.ErrUnavailable, err)
	}
	if refused := answer.refused(); refused != nil {
		return 0, refusalError(refused)
	}
	if answer.Sequence == 0 {
		return 0, fmt.Errorf("%w: an acknowledgement without a sequence", cas.ErrUnavailable)
	}
	return answer.Sequence, nil
}

// expect returns a header that makes the broker refuse a message, with errExists, unless the last
// one of its subject has this sequence; 0 is none.
func expect(sequence uint64) nats.Header {
	return nats.Header{jetstream.ExpectedLastSubjSeqHeader: {strconv.FormatUint(sequence, 10)}}
}

// ack is the broker's answer to one publish, which may be yet to come. It belongs to one goroutine.
type ack struct {
	publisher  *publisher
	id         uint64
	reconnects uint64 // of the connection, before the message was sent

	done     chan struct{} // closed by the answer
	sequence uint64        // set before done is closed
	err      error         // set before done is closed
}

// lookEvery is how often a wait asks whether the connection is still the one that was sent on.
const lookEvery = 250 * time.Millisecond

// wait returns the sequence under which the message is stored. Errors are those of brokerError. It
// takes timeout at most, after which the error wraps cas.ErrUnavailable, and may be called again: only
// an answer is final. A connection that was lost is one.
func (a *ack) wait(ctx context.Context, timeout time.Duration) (uint64, error) {
	if a.answered() {
		return a.sequence, a.err
	}
	timer := time.NewTimer(min(timeout, lookEvery))
	defer timer.Stop()
	for {
		select {
		case <-a.done:
			return a.sequence, a.err
		case <-ctx.Done():
			return 0, ended(ctx)
		case <-timer.C:
		}
		if a.isLost() && a.publisher.take(a.id) != nil {
			a.err = fmt.Errorf("%w: %w", cas.ErrUnavailable, nats.ErrDisconnected)
			close(a.done)
			continue
		}
		if timeout -= lookEvery; timeout <= 0 {
			return 0, fmt.Errorf("%w: no acknowledgement in time", cas.ErrUnavailable)
		}
		timer.Reset(min(timeout, lookEvery))
	}
}

// answered tells whether wait returns at once.
func (a *ack) answered() bool {
	select {
	case <-a.done:
		return true
	default:
		return false
	}
}

func (a *ack) isLost() bool {
	conn := a.publisher.conn
	return !conn.IsConnected() || conn.Stats().Reconnects != a.reconnects
}

// forget makes the publisher drop the answer if it still comes.
func (a *ack) forget() { a.publisher.take(a.id) }
