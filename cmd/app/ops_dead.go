package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// OpsDead lists dead letters.
type OpsDead struct {
	queueFlags `embed:""`
	Limit      int `help:"Most operations to list, the oldest first." default:"100"`
}

// deadRow is an operation in the list of those that were set aside.
type deadRow struct {
	opRow
	Died     time.Time        `json:"died"`
	Failures []broker.Failure `json:"failures"`
}

func (c *OpsDead) run(ctx context.Context, p *process) error {
	if c.Limit < 1 {
		return run.UsageError{Err: errors.New("--limit must be at least 1")}
	}
	return c.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		ops, more, err := client.Dead(ctx, c.Limit)
		if err != nil {
			return err
		}
		if err := c.print(p.out, client, ops); err != nil {
			return err
		}
		if more && !c.JSON {
			_, err = fmt.Fprintf(p.out, "There are more than these %d; --limit shows them.\n", len(ops))
		}
		return err
	})
}

func (c *OpsDead) print(out io.Writer, client *broker.Client, ops []*broker.Operation) error {
	if c.JSON {
		for _, op := range ops {
			if err := printJSON(out, deadRow{rowOf(client, op, -1), op.Updated, op.Failures}); err != nil {
				return err
			}
		}
		return nil
	}
	t := newTable(out, "OPERATION", "DIED", "ATTEMPTS", "INVOCATION", "ACTION", "WHY")
	for _, op := range ops {
		r := rowOf(client, op, -1)
		t.row(r.Name, age(time.Since(op.Updated))+" ago", strconv.Itoa(op.Attempt), orDash(r.Invocation), r.Action, orDash(r.Why))
	}
	return t.end()
}

// OpsRetry submits dead letters again.
type OpsRetry struct {
	queueFlags `embed:""`
	Names      []string `arg:"" help:"Operations as 'jetfarm ops dead' lists them."`
}

func (c *OpsRetry) run(ctx context.Context, p *process) error {
	return c.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		var errs []error
		for _, name := range c.Names {
			again, err := client.Retry(ctx, name)
			switch {
			case errors.Is(err, broker.ErrNotFound):
				err = fmt.Errorf("%s is none of those that were set aside ('jetfarm ops dead' lists them)", printable(name))
			case err != nil:
				err = fmt.Errorf("operation %s: %w", printable(name), err)
			case c.JSON:
				err = printJSON(p.out, struct {
					Retried   string `json:"retried"`
					Operation string `json:"operation"`
				}{name, again})
			default:
				_, err = fmt.Fprintf(p.out, "%s runs as %s\n", name, again)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
}
