package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
)

// PoolInfo is what an operator sees of a pool.
type PoolInfo struct {
	Name     string   `json:"name"`
	Platform Platform `json:"platform"`
	// Waiting and Running count jobs by lane, the soonest first, and Held those whose turn to enter a lane
	// has not come.
	Waiting []int `json:"waiting"`
	Running []int `json:"running"`
	Held    int   `json:"held"`
	// Workers serve the pool and take jobs; Slots and Busy are theirs together.
	Workers int `json:"workers"`
	Slots   int `json:"slots"`
	Busy    int `json:"busy"`
}

// Pools returns the pools of the farm in the order of their names.
func (c *Client) Pools(ctx context.Context) ([]PoolInfo, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*requestTimeout, ErrUnavailable)
	defer cancel()
	c.view.mu.Lock()
	infos := make([]PoolInfo, 0, len(c.view.pools))
	for name, platform := range c.view.pools {
		infos = append(infos, PoolInfo{Name: name, Platform: platform, Waiting: make([]int, lanes), Running: make([]int, lanes)})
	}
	c.view.mu.Unlock()
	slices.SortFunc(infos, func(a, b PoolInfo) int { return cmp.Compare(a.Name, b.Name) })
	for i := range infos {
		info := &infos[i]
		for lane := range lanes {
			var err error
			if info.Waiting[lane], info.Running[lane], err = count(ctx, c.jobs, consumerName(info.Name, lane)); err != nil {
				return nil, err
			}
		}
		var err error
		if info.Held, _, err = count(ctx, c.held, info.Name); err != nil {
			return nil, err
		}
		for _, w := range c.view.serving(info.Platform) {
			info.Workers, info.Slots, info.Busy = info.Workers+1, info.Slots+w.Slots, info.Busy+w.Busy
		}
	}
	return infos, nil
}

// count returns how many messages a consumer has not delivered, and how many wait for its acknowledgement.
func count(ctx context.Context, s jetstream.Stream, consumer string) (pending, delivered int, err error) {
	c, err := s.Consumer(ctx, consumer)
	switch {
	case errors.Is(err, jetstream.ErrConsumerNotFound): // of a pool that is being made
		return 0, 0, nil
	case err != nil:
		return 0, 0, unavailable(cause(ctx, err))
	}
	state := c.CachedInfo()
	return int(state.NumPending), state.NumAckPending, nil //nolint:gosec // bounded by the queue
}

// Active returns up to limit operations that wait or run, those in the queue first and then those that
// are held, each in the order in which they came, and whether there are more. Its cost depends on limit
// alone.
func (c *Client) Active(ctx context.Context, limit int) (ops []*Operation, more bool, err error) {
	seen := map[string]bool{}
	for _, from := range []struct {
		stream  jetstream.Stream
		subject string
	}{{c.jobs, jobSubject + "*.*.*"}, {c.held, heldSubject + "*.*"}} {
		if more, err = c.active(ctx, from.stream, from.subject, limit, seen, &ops); more || err != nil {
			return ops, more, err
		}
	}
	return ops, false, nil
}

func (c *Client) active(ctx context.Context, s jetstream.Stream, subject string, limit int, seen map[string]bool, ops *[]*Operation) (more bool, err error) {
	for sequence := uint64(1); ; {
		if len(*ops) == limit {
			return true, nil
		}
		job, err := c.following(ctx, s, sequence, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		sequence = job.Sequence + 1
		op, err := c.Get(ctx, job.Subject[strings.LastIndexByte(job.Subject, '.')+1:])
		switch {
		case errors.Is(err, ErrNotFound): // deleted, or not yet recorded
		case err != nil:
			return false, err
		case !op.Done() && !seen[op.Name]: // a job on its way into the queue is in both
			seen[op.Name] = true
			op.Held = s == c.held && op.Stage == repb.ExecutionStage_QUEUED
			*ops = append(*ops, op)
		}
	}
}

// Why says in a sentence why an operation is where it is, and how many are before it in its lane if
// that is known and not negative.
func (c *Client) Why(op *Operation, before int) string {
	switch {
	case op.Done():
		return op.Note
	case op.Stage == repb.ExecutionStage_EXECUTING:
		if op.Attempt > 1 {
			return fmt.Sprintf("runs on %s, attempt %d", op.Worker, op.Attempt)
		}
		return "runs on " + op.Worker
	}
	text := c.whyWaits(op, before)
	if op.Note != "" {
		return op.Note + "; " + text
	}
	return text
}

// explainAfter is how long an operation may wait without a word.
const explainAfter = time.Second

// Explain is Why for those who wait for the operation themselves, and "" while there is nothing to explain:
// it is queued and has just come, and some worker can run it.
func (c *Client) Explain(op *Operation) string {
	if op.Done() || op.Stage == repb.ExecutionStage_EXECUTING {
		return ""
	}
	if op.Note == "" && time.Since(op.Queued) < explainAfter && !c.view.isEmpty() && c.view.servable(op.Platform) == nil {
		return ""
	}
	return c.Why(op, -1)
}

// isEmpty tells whether there is no worker.
func (v *view) isEmpty() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.workers) == 0
}

func (c *Client) whyWaits(op *Operation, before int) string {
	if len(c.view.live()) == 0 {
		return "waits for a worker; there is none"
	}
	if err := c.view.servable(op.Platform); err != nil {
		return err.Error()
	}
	workers := c.view.serving(op.Platform)
	if len(workers) == 0 {
		return "every worker that could run it is draining or out of order"
	}
	slots, busy := 0, 0
	for _, w := range workers {
		slots, busy = slots+w.Slots, busy+w.Busy
	}
	text := fmt.Sprintf("%d of %d slots that could run it are busy", min(busy, slots), slots)
	switch {
	case op.Held:
		text += "; builds take turns, and its build's turn for it has not come"
	case before == 1:
		text += "; one operation is before it in its lane"
	case before > 1:
		text += fmt.Sprintf("; %d operations are before it in its lane", before)
	}
	return text
}
