package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jetfarm/jetfarm/broker"
)

// queueFlags are those of a command that looks at operations and workers.
type queueFlags struct {
	operatorFlags `embed:""`
	JSON          bool `name:"json" help:"One JSON object a line, for programs."`
}

// withQueue opens the operations of a farm that exists for the time of a function.
func (f *queueFlags) withQueue(ctx context.Context, p *process, do func(ctx context.Context, c *broker.Client) error) error {
	connections, err := f.connect(ctx, p, "operator")
	if err != nil {
		return err
	}
	defer closeAll(connections)
	c, err := broker.New(broker.Config{Conn: connections[0], Log: p.log})
	if err != nil {
		return err
	}
	err = c.Attach(ctx)
	if errors.Is(err, broker.ErrNoFarm) {
		return fmt.Errorf("%w; start 'jetfarm up' or a frontend first, or name another server with --nats", err)
	}
	if err != nil {
		return err
	}
	return do(ctx, c)
}

// table prints rows in columns.
type table struct {
	w     *tabwriter.Writer
	first error
}

func newTable(out io.Writer, columns ...string) *table {
	t := &table{w: tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)}
	t.row(columns...)
	return t
}

func (t *table) row(cells ...string) {
	if _, err := fmt.Fprintln(t.w, strings.Join(cells, "\t")); err != nil && t.first == nil {
		t.first = err
	}
}

func (t *table) end() error { return errors.Join(t.first, t.w.Flush()) }

// age renders how long something took or takes.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	}
	return d.Round(time.Minute).String()
}

// orDash stands in for what is not there.
func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return printable(text)
}

func platformText(p broker.Platform) string {
	properties := make([]string, len(p))
	for i, property := range p {
		properties[i] = property.String()
	}
	return orDash(strings.Join(properties, ","))
}

func sum(counts []int) int {
	total := 0
	for _, n := range counts {
		total += n
	}
	return total
}

func printJSON(out io.Writer, v any) error { return json.NewEncoder(out).Encode(v) }
