package app

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/jetfarm/jetfarm/broker"
)

// Status is a look at the whole farm.
type Status struct {
	queueFlags `embed:""`
}

// farmStatus is what Status tells.
type farmStatus struct {
	Workers  int                 `json:"workers"`
	Draining int                 `json:"draining"`
	Failing  int                 `json:"out_of_order"`
	Slots    int                 `json:"slots"`
	Busy     int                 `json:"busy"`
	Waiting  int                 `json:"waiting"`
	Running  int                 `json:"running"`
	Pools    []broker.PoolInfo   `json:"pools"`
	Oldest   *opRow              `json:"oldest,omitempty"`
	List     []broker.WorkerInfo `json:"worker_list"`
}

func (c *Status) run(ctx context.Context, p *process) error {
	return c.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		s, err := look(ctx, client)
		if err != nil {
			return err
		}
		if c.JSON {
			return printJSON(p.out, s)
		}
		_, err = fmt.Fprintf(p.out, "workers  %d live, %d of them draining, %d out of order; %d of %d slots are busy\nqueue    %d waiting, %d running\n",
			s.Workers, s.Draining, s.Failing, s.Busy, s.Slots, s.Waiting, s.Running)
		if err != nil {
			return err
		}
		if err := s.troubles(p.out); err != nil {
			return err
		}
		if s.Oldest != nil {
			if _, err := fmt.Fprintf(p.out, "oldest   %s has waited %s: %s\n", s.Oldest.Name, age(time.Since(s.Oldest.Queued)), printable(s.Oldest.Why)); err != nil {
				return err
			}
		}
		if _, err := fmt.Fprintln(p.out); err != nil {
			return err
		}
		t := newTable(p.out, "POOL", "WAITING", "RUNNING", "WORKERS", "BUSY", "SLOTS", "PLATFORM")
		for _, pool := range s.Pools {
			t.row(pool.Name, strconv.Itoa(sum(pool.Waiting)+pool.Held), strconv.Itoa(sum(pool.Running)), strconv.Itoa(pool.Workers),
				strconv.Itoa(pool.Busy), strconv.Itoa(pool.Slots), platformText(pool.Platform))
		}
		return t.end()
	})
}

// troubles prints what is wrong with workers.
func (s *farmStatus) troubles(out io.Writer) error {
	for _, w := range s.List {
		if w.Trouble == "" {
			continue
		}
		if _, err := fmt.Fprintf(out, "trouble  %s takes no actions: %s\n", printable(w.Name), printable(w.Trouble)); err != nil {
			return err
		}
	}
	return nil
}

func look(ctx context.Context, client *broker.Client) (*farmStatus, error) {
	pools, err := client.Pools(ctx)
	if err != nil {
		return nil, err
	}
	s := &farmStatus{Pools: pools, List: client.Workers()}
	for _, pool := range pools {
		s.Waiting += sum(pool.Waiting) + pool.Held
		s.Running += sum(pool.Running)
	}
	for _, w := range s.List {
		s.Workers, s.Slots, s.Busy = s.Workers+1, s.Slots+w.Slots, s.Busy+w.Busy
		if w.Draining {
			s.Draining++
		}
		if w.Trouble != "" {
			s.Failing++
		}
	}
	if s.Waiting > 0 {
		// The first that waits is not far behind those that run.
		ops, _, err := client.Active(ctx, s.Running+1)
		if err != nil {
			return nil, err
		}
		for _, op := range ops {
			if op.Worker == "" {
				row := rowOf(client, op, 0)
				s.Oldest = &row
				break
			}
		}
	}
	return s, nil
}
