package app

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// Workers are the operator's commands for workers.
type Workers struct {
	Ls      WorkersLs      `cmd:"" help:"List the live workers."`
	Drain   WorkersDrain   `cmd:"" help:"Make workers take no more actions; what they run goes on."`
	Undrain WorkersUndrain `cmd:"" help:"Make drained workers take actions again."`
}

// WorkersLs lists workers.
type WorkersLs struct {
	queueFlags `embed:""`
}

func (c *WorkersLs) run(ctx context.Context, p *process) error {
	return c.withQueue(ctx, p, func(_ context.Context, client *broker.Client) error {
		workers := client.Workers()
		if c.JSON {
			for _, w := range workers {
				if err := printJSON(p.out, w); err != nil {
					return err
				}
			}
			return nil
		}
		t := newTable(p.out, "NAME", "STATE", "BUSY", "SLOTS", "ISOLATION", "UP", "PLATFORM", "WHY")
		for _, w := range workers {
			t.row(printable(w.Name), stateOf(w), strconv.Itoa(w.Busy), strconv.Itoa(w.Slots), orDash(w.Isolation),
				age(time.Since(w.Started)), platformText(w.Platform), orDash(w.Trouble))
		}
		return t.end()
	})
}

func stateOf(w broker.WorkerInfo) string {
	switch {
	case w.Draining && w.Busy == 0:
		return "drained"
	case w.Draining:
		return "draining"
	case w.Trouble != "":
		return "out of order"
	case w.Busy >= w.Slots:
		return "full"
	}
	return "ready"
}

// WorkersDrain drains workers.
type WorkersDrain struct {
	queueFlags `embed:""`
	Names      []string `arg:"" help:"Names as 'jetfarm workers ls' shows them."`
}

func (c *WorkersDrain) run(ctx context.Context, p *process) error {
	return turn(ctx, p, &c.queueFlags, c.Names, true)
}

// WorkersUndrain undoes WorkersDrain.
type WorkersUndrain struct {
	queueFlags `embed:""`
	Names      []string `arg:"" help:"Names as 'jetfarm workers ls' shows them."`
}

func (c *WorkersUndrain) run(ctx context.Context, p *process) error {
	return turn(ctx, p, &c.queueFlags, c.Names, false)
}

// turn tells workers whether to take jobs, all of them even when one does not answer.
func turn(ctx context.Context, p *process, f *queueFlags, names []string, drain bool) error {
	return f.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		var errs []error
		for _, name := range names {
			info, err := client.DrainWorker(ctx, name, drain)
			switch {
			case errors.Is(err, broker.ErrInvalid):
				err = run.UsageError{Err: err}
			case errors.Is(err, broker.ErrUnknownWorker):
				err = fmt.Errorf("%w ('jetfarm workers ls' lists them)", err)
			case err == nil && f.JSON:
				err = printJSON(p.out, info)
			case err == nil:
				_, err = fmt.Fprintf(p.out, "%s is %s, %d of %d slots are busy\n", printable(info.Name), stateOf(info), info.Busy, info.Slots)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
}
