package worker_test

import (
	"testing"

	"github.com/jetfarm/jetfarm/broker"
)

// The files that a command has written to belong to the next command when it is over: what that one writes
// is never read as the output of the one before.
func TestLogEndsWithItsCommand(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	first := f.submit(broker.Request{Action: f.store(sh("echo first"))})
	f.wait(first)
	second := f.submit(broker.Request{Action: f.store(sh("echo the second one; sleep 600"))})
	read := func(operation string) (text string, done *broker.Operation) {
		for part, err := range f.client.Log(t.Context(), operation, broker.Stdout, 0, false) {
			if err != nil {
				t.Fatal(err)
			}
			text, done = text+string(part.Data), part.Done
		}
		return text, done
	}
	for range 10_000 {
		if text, _ := read(second); text != "" {
			break
		}
	}
	if text, done := read(second); text != "the second one\n" || done != nil {
		t.Errorf("the log of the running action is %q, done %v", text, done)
	}
	if text, done := read(first); text != "" || done == nil {
		t.Errorf("the worker still has %q of an action that is over, done %v", text, done)
	}
	if err := f.client.Cancel(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	f.wait(second)
}
