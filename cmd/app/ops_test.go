package app_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cmd/app"
)

// operate runs an operator's command on a farm.
func operate(t *testing.T, farm *brokertest.Farm, args ...string) (out string, err error) {
	t.Helper()
	var stdout bytes.Buffer
	err = app.Run(t.Context(), append(args, "--nats", farm.URL()), &stdout, io.Discard)
	return stdout.String(), err
}

// TestOpsDeadAndRetry: what was set aside is listed with its reasons, and runs again when asked to.
func TestOpsDeadAndRetry(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	if out, err := operate(t, farm, "ops", "dead"); err != nil || strings.Count(out, "\n") != 1 {
		t.Errorf("ops dead of a farm without letters printed %q, %v", out, err)
	}
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Slots: 1})
	action := castest.Space(t, "team").Of([]byte("an action"))
	operation, err := c.Submit(t.Context(), broker.Request{Action: action})
	if err != nil {
		t.Fatal(err)
	}
	take := func() *broker.Lease {
		l, err := q.Next(t.Context())
		if err == nil {
			err = l.Begin(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	for range broker.MaxAttempts {
		if err := take().Return(t.Context(), "the disk is \x1bfull"); err != nil && !errors.Is(err, broker.ErrExhausted) {
			t.Fatal(err)
		}
	}
	out, err := operate(t, farm, "ops", "dead")
	if err != nil || !strings.Contains(out, operation) || strings.Count(out, "w1: the disk is") != 3 || strings.Contains(out, "\x1b") {
		t.Errorf("ops dead printed\n%s%v", out, err)
	}
	if out, err = operate(t, farm, "ops", "dead", "--json"); err != nil {
		t.Fatal(err)
	}
	var row struct {
		Name, Instance string
		Failures       []broker.Failure
	}
	if err := json.Unmarshal([]byte(out), &row); err != nil || row.Name != operation || row.Instance != "team" || len(row.Failures) != 3 || row.Failures[2].Worker != "w1" {
		t.Errorf("ops dead --json printed %s: %+v, %v", out, row, err)
	}
	if out, err = operate(t, farm, "ops", "show", operation); err != nil || !strings.Contains(out, "UNAVAILABLE") {
		t.Errorf("ops show printed\n%s%v", out, err)
	}

	if out, err = operate(t, farm, "ops", "retry", operation); err != nil {
		t.Fatal(err)
	}
	l := take()
	if want := operation + " runs as " + l.Job().Operation + "\n"; out != want || l.Job().Action != action {
		t.Errorf("ops retry printed %q, want %q", out, want)
	}
	l.Drop(t.Context())
	if out, err = operate(t, farm, "ops", "retry", operation); err == nil || !strings.Contains(err.Error(), "ops dead") {
		t.Errorf("a second retry printed %q, %v", out, err)
	}
}

// TestOpsTakeNamesOfWaiters: the operator's commands take the names that clients were given, and what the operator
// cancels ends for all of them (row X-111).
func TestOpsTakeNamesOfWaiters(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	request := broker.Request{Action: castest.Space(t, "").Of([]byte("an action"))}
	var waiters errgroup.Group
	names := make(chan string, 2)
	for range 2 {
		waiters.Go(func() error {
			named := false
			for op, err := range c.Execute(t.Context(), request) {
				if err != nil {
					return err
				}
				if !named {
					named = true
					names <- op.WaiterName()
				}
			}
			return nil
		})
	}
	one, two := <-names, <-names
	operation := broker.OperationOf(one)
	if err := c.Cancel(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string]string{
		"ops show " + one: "CANCELLED", "ops show " + two: "QUEUED", "ops show " + operation: "QUEUED", "ops ls": operation, "ops logs " + one: "",
	} {
		out, err := operate(t, farm, strings.Fields(command)...)
		if err != nil || !strings.Contains(out, want) || strings.Count(out, operation) > 1 {
			t.Errorf("%s printed\n%s%v\nwant %q", command, out, err, want)
		}
	}
	if out, err := operate(t, farm, "ops", "cancel", one); err != nil || out != "cancelled: 1\n" {
		t.Errorf("ops cancel printed %q, %v", out, err)
	}
	if err := waiters.Wait(); err != nil {
		t.Error(err)
	}
	if op, err := c.Get(t.Context(), two); err != nil || !op.Done() {
		t.Errorf("after ops cancel the other waiter sees %+v, %v", op, err)
	}
}

// TestTroubleIsSaid: what is wrong with a worker that took itself out is in the lists, and it gets no work.
func TestTroubleIsSaid(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Slots: 1})
	q.SetTrouble(t.Context(), "the disk is full")
	if _, err := c.Submit(t.Context(), broker.Request{Action: castest.Space(t, "").Of([]byte("an action"))}); err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string][]string{
		"workers ls": {"out of order", "the disk is "},
		"status":     {"1 out of order", "w1 takes no actions: the disk is "},
		"ops ls":     {"draining or out of order"},
	} {
		out, err := operate(t, farm, strings.Fields(command)...)
		for _, part := range want {
			if err != nil || !strings.Contains(out, part) {
				t.Errorf("%s printed\n%s%v\nwithout %q", command, out, err, part)
			}
		}
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("no job"))
	defer cancel()
	if l, err := q.Next(ctx); err == nil {
		t.Errorf("a worker that is out of order took %s", l.Job().Operation)
	}
	q.SetTrouble(t.Context(), "")
	l, err := q.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.Drop(t.Context())
}
