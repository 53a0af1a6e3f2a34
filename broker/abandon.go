package broker

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/genproto/googleapis/rpc/code"
)

// An operation that nobody watches any more is cancelled after Config.Abandoned (D23): most clients
// never call CancelOperation, they just leave. Whoever watches is asked, since it may be anywhere in the
// farm: a message without a payload goes to the subject of the operation's status, and every watcher
// answers it. Two ask: the process whose watcher left, for the sake of the queue, and the worker that
// runs the operation, for that process may be the one that died.
//
// Rejected: counting watchers in the record, where a count that a dead process took with it stays for
// ever, and asking the broker for interest in the subject, which the worker has itself.

const (
	// answerBound is how long watchers may take to answer.
	answerBound = 2 * time.Second
	// maxLeft bounds the operations that are remembered for having been left. The workers find the others.
	maxLeft = 200_000
	// askAtOnce is how many operations are asked about at the same time.
	askAtOnce = 1000

	abandonedText = "nobody waited for the operation any more"
)

// departures are the operations whose watcher left before the end, oldest first.
type departures struct {
	mu   sync.Mutex
	left []departure // guarded by mu
}

type departure struct {
	operation string
	at        time.Time
}

func (d *departures) add(operation string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.left) < maxLeft {
		d.left = append(d.left, departure{operation, time.Now()})
	}
}

// due removes the operations that were left longer ago than age, at most askAtOnce of them.
func (d *departures) due(age time.Duration) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var operations []string
	seen := map[string]bool{}
	n := 0
	for n < len(d.left) && len(operations) < askAtOnce && time.Since(d.left[n].at) >= age {
		if operation := d.left[n].operation; !seen[operation] {
			seen[operation] = true
			operations = append(operations, operation)
		}
		n++
	}
	d.left = d.left[n:]
	if len(d.left) == 0 {
		d.left = nil // gives the memory back
	}
	return operations
}

// cancelAbandoned ends the operations that their last watcher has left, until ctx ends.
func (c *Client) cancelAbandoned(ctx context.Context) error {
	ticker := time.NewTicker(min(time.Second, c.abandoned))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		for {
			operations := c.departed.due(c.abandoned)
			if len(operations) == 0 {
				break
			}
			unwatched, err := c.unwatched(ctx, operations)
			if err != nil {
				c.log.DebugContext(ctx, "ask who watches", "err", err)
			}
			for _, operation := range unwatched {
				c.endAbandoned(ctx, operation)
			}
		}
	}
}

// endAbandoned cancels an operation that nobody watches, unless it was submitted to be that.
func (c *Client) endAbandoned(ctx context.Context, operation string) {
	err := c.endIf(ctx, operation, code.Code_CANCELLED, abandonedText, func(r *record) bool { return !r.Unattended })
	if err != nil && !errors.Is(err, ErrNotFound) && ctx.Err() == nil {
		c.log.WarnContext(ctx, "cancel abandoned operation", "operation", operation, "err", err)
	}
}

// unwatched returns those of the operations that no watcher in the farm answers for. With an error
// nothing is known.
func (c *Client) unwatched(ctx context.Context, operations []string) ([]string, error) {
	a := newAnswers(len(operations))
	inbox := nats.NewInbox()
	sub, err := c.nc.Subscribe(inbox+".*", func(m *nats.Msg) {
		if m.Header.Get("Status") == "" { // else nobody has subscribed, which is no answer
			a.take(m.Subject[len(inbox)+1:])
		}
	})
	if err != nil {
		return nil, unavailable(err)
	}
	defer sub.Unsubscribe() //nolint:errcheck // of a connection that is closed nothing is left
	for i, operation := range operations {
		if err := c.nc.PublishRequest(statusSubject+operation, inbox+"."+strconv.Itoa(i), nil); err != nil {
			return nil, unavailable(err)
		}
	}
	flushing, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	if err := c.nc.FlushWithContext(flushing); err != nil {
		return nil, unavailable(err)
	}
	timer := time.NewTimer(answerBound)
	defer timer.Stop()
	select {
	case <-a.complete:
		return nil, nil
	case <-timer.C:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if !c.nc.IsConnected() {
		return nil, ErrUnavailable
	}
	var none []string
	for i, operation := range operations {
		if !a.has(i) {
			none = append(none, operation)
		}
	}
	return none, nil
}

// answers are those of watchers to numbered questions.
type answers struct {
	complete chan struct{} // closed when all are there

	mu    sync.Mutex
	given []bool // guarded by mu
	left  int    // guarded by mu
}

func newAnswers(n int) *answers {
	return &answers{complete: make(chan struct{}), given: make([]bool, n), left: n}
}

// take notes an answer. Whoever answers may say anything, and more than once.
func (a *answers) take(number string) {
	i, err := strconv.Atoi(number)
	if err != nil || i < 0 || i >= len(a.given) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.given[i] {
		return
	}
	a.given[i] = true
	if a.left--; a.left == 0 {
		close(a.complete)
	}
}

func (a *answers) has(i int) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.given[i]
}

// question tells whether a message asks who watches.
func question(m *nats.Msg) bool { return m.Reply != "" && len(m.Data) == 0 }

// answer tells whoever asks that somebody watches, unless this is the worker's own watcher.
func (w *watcher) answer(ctx context.Context, m *nats.Msg) {
	if w.silent {
		return
	}
	if err := w.c.nc.Publish(m.Reply, nil); err != nil {
		w.c.log.WarnContext(ctx, "tell that an operation is watched", "operation", w.operation, "err", err)
	}
}

// deserted asks whether the operation of a lease that has begun is watched, and returns when the
// absence of watchers began, now at the earliest.
func (l *Lease) deserted(ctx context.Context, since time.Time) time.Time {
	now := time.Now()
	none, err := l.q.c.unwatched(ctx, []string{l.record.Operation})
	switch {
	case err != nil || len(none) == 0:
		return time.Time{}
	case since.IsZero():
		return now
	}
	return since
}
