package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
)

// The payloads of a message to a worker.
const (
	drainCommand   = "drain"
	undrainCommand = "undrain"
)

// controlBuffer is how many commands may wait for a worker; a worker that has more is not asked.
const controlBuffer = 16

// DrainWorker makes a live worker take no more jobs, or take jobs again, and returns what it says of
// itself after that. What it runs goes on. A worker that is restarted takes jobs. The error wraps
// ErrUnknownWorker for a worker that does not answer, ErrInvalid for a name that none can have.
func (c *Client) DrainWorker(ctx context.Context, name string, drain bool) (WorkerInfo, error) {
	if !validWorker(name) {
		return WorkerInfo{}, fmt.Errorf("%w: %.64q is not the name of a worker", ErrInvalid, name)
	}
	command := undrainCommand
	if drain {
		command = drainCommand
	}
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, ErrUnavailable)
	defer cancel()
	reply, err := c.nc.RequestWithContext(ctx, workerSubject+name, []byte(command))
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return WorkerInfo{}, fmt.Errorf("%s: %w", name, ErrUnknownWorker)
	case err != nil:
		return WorkerInfo{}, unavailable(cause(ctx, err))
	}
	var info WorkerInfo
	if err := json.Unmarshal(reply.Data, &info); err != nil {
		return WorkerInfo{}, fmt.Errorf("answer of worker %s: %w", name, err)
	}
	return info, nil
}

// ErrUnknownWorker reports a name that no live worker answers to.
var ErrUnknownWorker = errors.New("no live worker has this name")

// validWorker tells whether a name can be one token of a subject.
func validWorker(name string) bool {
	if name == "" || len(name) > 256 {
		return false
	}
	for _, r := range name {
		if r <= ' ' || r == '.' || r == '*' || r == '>' || r > '~' {
			return false
		}
	}
	return true
}

// obey does what operators ask of this worker until ctx ends.
func (q *Queue) obey(ctx context.Context) error {
	commands := make(chan *nats.Msg, controlBuffer)
	sub, err := q.c.nc.ChanSubscribe(workerSubject+q.self.Name, commands)
	if err != nil {
		return unavailable(err)
	}
	defer sub.Unsubscribe() //nolint:errcheck // of a connection that is closed nothing is left
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-commands:
			switch string(m.Data) {
			case drainCommand:
				q.setDraining(ctx, true)
			case undrainCommand:
				q.setDraining(ctx, false)
			}
			answer, err := json.Marshal(q.info())
			if err == nil {
				err = m.Respond(answer)
			}
			if err != nil {
				q.c.log.WarnContext(ctx, "answer an operator", "err", err)
			}
		}
	}
}

// setDraining makes Next wait, or go on.
func (q *Queue) setDraining(ctx context.Context, draining bool) {
	q.mu.Lock()
	changed := q.draining != draining
	q.draining = draining
	if changed {
		close(q.turned)
		q.turned = make(chan struct{})
	}
	q.mu.Unlock()
	if changed {
		q.c.log.InfoContext(ctx, "an operator changed whether this worker takes jobs", "draining", draining)
	}
	q.register(ctx)
}

// SetTrouble makes the registry say why the worker takes no jobs, and Next wait; "" makes it go on, unless
// an operator drains the worker.
func (q *Queue) SetTrouble(ctx context.Context, why string) {
	why = strings.ToValidUTF8(fmt.Sprintf("%.*s", maxReason, why), "")
	q.mu.Lock()
	changed := q.trouble != why
	q.trouble = why
	if changed {
		close(q.turned)
		q.turned = make(chan struct{})
	}
	q.mu.Unlock()
	switch {
	case changed && why != "":
		q.c.log.ErrorContext(ctx, "the worker is out of order and takes no jobs", "worker", q.self.Name, "err", why)
	case changed:
		q.c.log.InfoContext(ctx, "the worker works again", "worker", q.self.Name)
	}
	q.register(ctx)
}

// takesJobs tells whether Next may look for a job, and returns a channel that is closed when that
// changes.
func (q *Queue) takesJobs() (bool, <-chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.draining && q.trouble == "", q.turned
}
