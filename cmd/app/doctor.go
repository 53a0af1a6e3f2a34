package app

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jetfarm/jetfarm/cmd/run"
)

// Doctor checks a machine and a farm.
type Doctor struct {
	operatorFlags `embed:""`
	GRPC          string `name:"grpc" help:"Address of a frontend to check as well. Default: that of the farm on this machine." placeholder:"HOST:PORT"`
	HTTP          string `name:"http" help:"Address of its probes." placeholder:"HOST:PORT"`
	Worker        bool   `help:"Check this machine as one of workers, and not the farm."`
	JSON          bool   `name:"json" help:"One JSON object when all is checked."`
}

// The outcomes of a check.
const (
	statusOK   = "ok"
	statusWarn = "warn"
	statusFail = "fail"
)

// finding is what one check found.
type finding struct {
	Check  string `json:"check"`
	Status string `json:"status"`
	Text   string `json:"text"`
	// Fix is what to do about it.
	Fix string `json:"fix,omitempty"`
}

// exam is a number of checks. What depends on another that failed is not checked: it would only hide
// the cause.
type exam struct {
	tell     func(finding) error
	findings []finding
	unheard  error
}

func (e *exam) add(status, check, text, fix string) {
	f := finding{Check: check, Status: status, Text: text, Fix: fix}
	e.findings = append(e.findings, f)
	if err := e.tell(f); err != nil {
		e.unheard = err
	}
}

func (e *exam) ok(check, format string, v ...any) {
	e.add(statusOK, check, fmt.Sprintf(format, v...), "")
}

// warn tells of what works but should be changed, fail of what does not work.
func (e *exam) warn(check, fix, format string, v ...any) {
	e.add(statusWarn, check, fmt.Sprintf(format, v...), fix)
}

func (e *exam) fail(check, fix, format string, v ...any) {
	e.add(statusFail, check, fmt.Sprintf(format, v...), fix)
}

// failed counts the failures, and returns the first.
func (e *exam) failed() (n int, first finding) {
	for _, f := range e.findings {
		if f.Status == statusFail {
			if n++; n == 1 {
				first = f
			}
		}
	}
	return n, first
}

// printFinding writes a finding for people. What others have written must not do more than be read.
func printFinding(out io.Writer) func(finding) error {
	return func(f finding) error {
		text := fmt.Sprintf("%-4s %s: %s\n", f.Status, f.Check, oneLine(f.Text))
		if f.Fix != "" {
			text += "     fix: " + f.Fix + "\n"
		}
		_, err := io.WriteString(out, text)
		return err
	}
}

func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
}

// doctorTimeout bounds each question of an examination.
const doctorTimeout = 5 * time.Second

func (d *Doctor) run(ctx context.Context, p *process) error {
	if err := checkAddresses(map[string]string{"grpc": d.GRPC, "http": d.HTTP}); err != nil {
		return err
	}
	if d.Worker && (d.GRPC != "" || d.HTTP != "") {
		return run.UsageError{Err: fmt.Errorf("--worker checks this machine; --grpc and --http belong to a farm")}
	}
	e := &exam{tell: printFinding(p.out)}
	if d.JSON {
		e.tell = func(finding) error { return nil }
	}
	d.machine(e)
	if d.Worker {
		d.worker(e)
	} else {
		d.farm(ctx, p, e)
	}
	n, first := e.failed()
	if d.JSON {
		e.unheard = json.NewEncoder(p.out).Encode(map[string]any{"findings": e.findings, "failed": n})
	}
	switch {
	case e.unheard != nil:
		return e.unheard
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case n > 0:
		return fmt.Errorf("%d of %d checks failed; begin with %s", n, len(e.findings), first.Check)
	}
	return nil
}

// farm checks the way to the broker, the broker, its storage and the frontend, in this order.
func (d *Doctor) farm(ctx context.Context, p *process, e *exam) {
	b := d.broker(ctx, p, e)
	if b == nil {
		return
	}
	defer b.close()
	if !b.jetstream(ctx, e) {
		return
	}
	if b.streams(ctx, e) {
		b.storage(ctx, p, e)
		b.workers(ctx, e)
	}
	fields, _ := d.local()
	grpc, http := d.GRPC, d.HTTP
	if len(d.NATS) == 0 && grpc == "" && http == "" {
		grpc, http = fields["grpc"], fields["http"]
	}
	if grpc != "" {
		checkFrontend(ctx, e, grpc)
	}
	if http != "" {
		checkReady(ctx, e, http)
	}
}
