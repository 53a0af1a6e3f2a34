package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// Ops are the operator's commands for operations.
type Ops struct {
	Ls     OpsLs     `cmd:"" help:"List operations that wait or run, and say why each waits."`
	Show   OpsShow   `cmd:"" help:"Show one operation."`
	Logs   OpsLogs   `cmd:"" help:"Print what the action of an operation writes, while it runs and after that."`
	Cancel OpsCancel `cmd:"" help:"Cancel operations: queued ones do not run, running ones are killed."`
	Dead   OpsDead   `cmd:"" help:"List operations that were set aside because all their attempts failed."`
	Retry  OpsRetry  `cmd:"" help:"Run actions again that were set aside."`
}

// OpsLs lists operations.
type OpsLs struct {
	queueFlags `embed:""`
	All        bool   `help:"Finished operations as well; this reads the record of every one of the last hour."`
	Invocation string `help:"Only those of one invocation of the build tool." placeholder:"ID"`
	Limit      int    `help:"Most operations to list." default:"100"`
}

// opRow is an operation in a list of them.
type opRow struct {
	Name       string    `json:"name"`
	Stage      string    `json:"stage"`
	Action     string    `json:"action"`
	Instance   string    `json:"instance"`
	Queued     time.Time `json:"queued"`
	Updated    time.Time `json:"updated"`
	Pool       string    `json:"pool"`
	Lane       int       `json:"lane"`
	Priority   int32     `json:"priority"`
	Attempt    int       `json:"attempt"`
	Worker     string    `json:"worker,omitempty"`
	Invocation string    `json:"invocation,omitempty"`
	Platform   string    `json:"platform,omitempty"`
	Why        string    `json:"why,omitempty"`
}

func rowOf(c *broker.Client, op *broker.Operation, before int) opRow {
	return opRow{
		Name: op.Name, Stage: op.Stage.String(), Action: strings.TrimPrefix(op.Action.Blob(), "blobs/"), Instance: op.Action.Space().Instance(),
		Queued: op.Queued, Updated: op.Updated, Pool: op.Pool, Lane: op.Lane, Priority: op.Priority, Attempt: op.Attempt,
		Worker: op.Worker, Invocation: op.Invocation, Platform: platformText(op.Platform), Why: c.Why(op, before),
	}
}

func (c *OpsLs) run(ctx context.Context, p *process) error {
	if c.Limit < 1 {
		return run.UsageError{Err: errors.New("--limit must be at least 1")}
	}
	return c.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		rows, more, err := c.rows(ctx, client)
		if err != nil {
			return err
		}
		if err := c.print(p.out, rows); err != nil {
			return err
		}
		if more && !c.JSON {
			_, err = fmt.Fprintf(p.out, "There are more than these %d; --limit shows them.\n", len(rows))
		}
		return err
	})
}

// rows finds what is to be listed. The filter of an invocation applies before the limit.
func (c *OpsLs) rows(ctx context.Context, client *broker.Client) (rows []opRow, more bool, err error) {
	l := &opList{client: client, invocation: c.Invocation, limit: c.Limit, before: map[string]int{}}
	if !c.All {
		limit := c.Limit
		if c.Invocation != "" {
			limit = maxActive
		}
		ops, more, err := client.Active(ctx, limit)
		all := l.add(ops)
		return l.rows, !all || more, err
	}
	for token := ""; ; {
		ops, next, err := client.List(ctx, broker.MaxList, token)
		if err != nil {
			return nil, false, err
		}
		if !l.add(ops) {
			return l.rows, true, nil
		}
		if token = next; token == "" {
			return l.rows, false, nil
		}
	}
}

// opList gathers rows, at most limit of them, and counts who waits before whom.
type opList struct {
	client     *broker.Client
	invocation string // "" is any
	limit      int
	rows       []opRow
	before     map[string]int // operations that wait, by pool and lane
}

// add returns false when there was no room for all.
func (l *opList) add(ops []*broker.Operation) bool {
	for _, op := range ops {
		queue := op.Pool + "/" + strconv.Itoa(op.Lane)
		if l.invocation == "" || op.Invocation == l.invocation {
			if len(l.rows) == l.limit {
				return false
			}
			l.rows = append(l.rows, rowOf(l.client, op, l.before[queue]))
		}
		if !op.Done() && op.Stage != repb.ExecutionStage_EXECUTING {
			l.before[queue]++
		}
	}
	return true
}

// maxActive bounds the operations that a filter looks at.
const maxActive = 200_000

func (c *OpsLs) print(out io.Writer, rows []opRow) error {
	if c.JSON {
		for _, r := range rows {
			if err := printJSON(out, r); err != nil {
				return err
			}
		}
		return nil
	}
	t := newTable(out, "OPERATION", "STAGE", "AGE", "PRIORITY", "INVOCATION", "WHY")
	for _, r := range rows {
		t.row(r.Name, r.Stage, age(time.Since(r.Queued)), strconv.Itoa(int(r.Priority)), orDash(r.Invocation), orDash(r.Why))
	}
	return t.end()
}

// OpsShow shows an operation.
type OpsShow struct {
	queueFlags `embed:""`
	Name       string `arg:"" help:"The operation's name, or the one that a client was given: then what this client is told."`
}

func (c *OpsShow) run(ctx context.Context, p *process) error {
	return c.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		op, err := client.Get(ctx, c.Name)
		if err != nil {
			return fmt.Errorf("operation %s: %w (finished ones are kept for an hour)", printable(c.Name), err)
		}
		r := rowOf(client, op, -1)
		outcome := outcomeOf(op)
		if c.JSON {
			return printJSON(p.out, struct {
				opRow
				Waiter  string `json:"waiter,omitempty"`
				Outcome string `json:"outcome,omitempty"`
			}{r, op.Waiter, outcome})
		}
		t := newTable(p.out, "operation", r.Name)
		if op.Waiter != "" {
			t.row("as told to", "waiter "+op.Waiter)
		}
		t.row("stage", r.Stage)
		t.row("why", orDash(r.Why))
		t.row("outcome", orDash(outcome))
		t.row("action", r.Action)
		t.row("instance", orDash(r.Instance))
		t.row("invocation", orDash(r.Invocation))
		t.row("queued", r.Queued.Format(time.RFC3339Nano)+", "+age(time.Since(r.Queued))+" ago")
		t.row("last change", r.Updated.Format(time.RFC3339Nano)+", "+age(time.Since(r.Updated))+" ago")
		t.row("worker", orDash(r.Worker))
		t.row("attempt", strconv.Itoa(r.Attempt))
		t.row("priority", strconv.Itoa(int(r.Priority))+", lane "+strconv.Itoa(r.Lane))
		t.row("platform", r.Platform)
		return t.end()
	})
}

// outcomeOf says how an operation ended.
func outcomeOf(op *broker.Operation) string {
	if !op.Done() {
		return ""
	}
	if !op.ResponseBlob.IsZero() {
		return "a large response, in the blob " + op.ResponseBlob.Blob()
	}
	response := new(repb.ExecuteResponse)
	if err := proto.Unmarshal(op.Response, response); err != nil {
		return "a response that cannot be read: " + err.Error()
	}
	if status := response.GetStatus(); status.GetCode() != int32(code.Code_OK) {
		return code.Code(status.GetCode()).String() + ": " + status.GetMessage()
	}
	text := "exit code " + strconv.Itoa(int(response.GetResult().GetExitCode()))
	if response.GetCachedResult() {
		text += ", from the action cache"
	}
	if response.GetMessage() != "" {
		text += ": " + response.GetMessage()
	}
	return text
}

// OpsCancel cancels operations.
type OpsCancel struct {
	queueFlags `embed:""`
	Names      []string `arg:"" optional:"" help:"Names of operations. They are cancelled for all who wait for them."`
	Invocation string   `help:"Cancel what waits or runs for one invocation of the build tool." placeholder:"ID"`
}

func (c *OpsCancel) run(ctx context.Context, p *process) error {
	if (len(c.Names) == 0) == (c.Invocation == "") {
		return run.UsageError{Err: errors.New("name operations or give --invocation, one of both")}
	}
	return c.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		names := c.Names
		if c.Invocation != "" {
			ops, _, err := client.Active(ctx, maxActive)
			if err != nil {
				return err
			}
			for _, op := range ops {
				if op.Invocation == c.Invocation {
					names = append(names, op.Name)
				}
			}
		}
		var errs []error
		cancelled := 0
		for _, name := range names {
			if err := client.Cancel(ctx, broker.OperationOf(name)); err != nil {
				errs = append(errs, fmt.Errorf("operation %s: %w", printable(name), err))
				continue
			}
			cancelled++
		}
		_, err := fmt.Fprintf(p.out, "cancelled: %d\n", cancelled)
		return errors.Join(append(errs, err)...)
	})
}
