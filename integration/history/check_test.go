package history_test

import (
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/integration/history"
)

var (
	output = &repb.Digest{Hash: strings.Repeat("ab", 32), SizeBytes: 3}
	good   = &repb.ExecuteResponse{Result: &repb.ActionResult{
		OutputFiles: []*repb.OutputFile{{Path: "out", Digest: output}}, ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w1"},
	}}
)

func serialized(m proto.Message) string {
	data, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return string(data)
}

func queued() history.Message {
	return history.Message{Operation: "OP", Stage: repb.ExecutionStage_QUEUED}
}

func executing() history.Message {
	return history.Message{Operation: "OP", Stage: repb.ExecutionStage_EXECUTING}
}

func done(response *repb.ExecuteResponse) history.Message {
	return history.Message{Operation: "OP", Stage: repb.ExecutionStage_COMPLETED, Done: true, Response: response}
}

func ended(code codes.Code) *repb.ExecuteResponse {
	return &repb.ExecuteResponse{Status: &statuspb.Status{Code: int32(code)}}
}

// clean is a history as it should be: an operation whose first worker and whose frontend died, with two
// waiters.
func clean() *history.History {
	return &history.History{
		Asks: []*history.Ask{
			{Client: "c1", Action: "a", Streams: []*history.Stream{
				{Messages: []history.Message{queued(), executing(), queued()}, End: codes.Unavailable},
				{Waited: "OP", End: codes.Unavailable},
				{Waited: "OP", Messages: []history.Message{queued(), executing(), done(good)}},
			}},
			{Client: "c2", Action: "a", Streams: []*history.Stream{
				{Messages: []history.Message{executing()}, GaveUp: true, End: codes.Canceled},
				{Waited: "OP", Messages: []history.Message{done(good)}},
			}},
			{Client: "c3", Action: "a", Streams: []*history.Stream{{Messages: []history.Message{
				{Operation: "cached-1", Stage: repb.ExecutionStage_COMPLETED, Done: true, Response: good},
			}}}},
		},
		States: []history.State{
			{Operation: "OP", Action: "a", Revision: 9, Stage: repb.ExecutionStage_COMPLETED, Attempt: 2, Response: serialized(good)},
			{Operation: "OP", Action: "a", Revision: 1, Stage: repb.ExecutionStage_QUEUED},
			{Operation: "OP", Action: "a", Revision: 3, Stage: repb.ExecutionStage_EXECUTING, Attempt: 1},
			{Operation: "OP", Action: "a", Revision: 4, Stage: repb.ExecutionStage_QUEUED, Attempt: 1},
		},
		Records: []history.State{{
			Operation: "OP", Action: "a", Revision: 9, Stage: repb.ExecutionStage_COMPLETED, Attempt: 2, Response: serialized(good),
		}},
		Runs:  map[string]int{"a": 2},
		Found: map[string]string{history.Text(output): history.Text(output)},
	}
}

func TestCleanHistoryHasNoViolation(t *testing.T) {
	for _, violation := range clean().Check() {
		t.Error(violation)
	}
}

// Each history has one thing that must not be, and the check says which.
func TestEachViolationIsCaught(t *testing.T) {
	other := proto.CloneOf(good)
	other.Result.ExecutionMetadata.Worker = "w2"
	red := proto.CloneOf(good)
	red.Result.ExitCode = 1
	last := func(h *history.History) *history.Stream { return h.Asks[0].Streams[2] }
	for _, test := range []struct {
		name  string
		spoil func(*history.History)
		want  string
	}{
		{"no terminal", func(h *history.History) { last(h).Messages = last(h).Messages[:2]; last(h).End = codes.Unavailable }, "not ended: c1, action a"},
		{"never called", func(h *history.History) { h.Ask("c4", "a") }, "not ended: c4"},
		{"ended without done", func(h *history.History) { last(h).Messages = last(h).Messages[:2] }, "ended early: c1"},
		{"red by status", func(h *history.History) { h.Asks[2].Streams[0].Messages[0].Response = ended(codes.Canceled) }, "red: c3"},
		{"red by exit code", func(h *history.History) { h.Asks[2].Streams[0].Messages[0].Response = red }, "red: c3, action a: exit code 1"},
		{"terminal twice in a stream", func(h *history.History) { last(h).Messages = append(last(h).Messages, done(good)) }, "after the end: c1"},
		{"stage after the end", func(h *history.History) { last(h).Messages = append(last(h).Messages, executing(), done(good)) }, "after the end: c1"},
		{"asked again after the end", func(h *history.History) {
			h.Asks[0].Streams = append(h.Asks[0].Streams, &history.Stream{Waited: "OP", Messages: []history.Message{done(good)}})
		}, "asked again: c1, action a: stream 4"},
		{"two waiters are told different ends", func(h *history.History) { last(h).Messages[2].Response = other }, "two terminals: operation OP"},
		{"a stream of two operations", func(h *history.History) { last(h).Messages[1].Operation = "OTHER"; h.Asks[2].Streams[0].Messages = nil }, "other operation: c1"},
		{"wait for one, get another", func(h *history.History) { last(h).Waited = "OTHER" }, "other operation: c1"},
		{"done in another stage", func(h *history.History) { last(h).Messages[2].Stage = repb.ExecutionStage_EXECUTING }, "stage: c1"},
		{"completed and not done", func(h *history.History) { last(h).Messages[0].Stage = repb.ExecutionStage_COMPLETED }, "stage: c1"},
		{"no stage", func(h *history.History) { last(h).Messages[0].Stage = repb.ExecutionStage_UNKNOWN }, "has no stage"},
		{"an end that is not repeated", func(h *history.History) { h.Asks[0].Streams[0].End = codes.Internal }, "end: c1, action a, stream 1: Internal"},
		{"Execute is not found", func(h *history.History) { h.Asks[0].Streams[0].End = codes.NotFound }, "end: c1, action a, stream 1: NotFound"},
		{"lost while it is waited for", func(h *history.History) {
			h.Asks[0].Streams[1].Messages, h.Asks[0].Streams[1].End = []history.Message{queued()}, codes.NotFound
		}, "end: c1, action a, stream 2: NotFound"},
		{"an upload is refused", func(h *history.History) { h.Asks[1].Failed = "upload: INTERNAL" }, "refused: c2, action a: upload"},
		{"attempts go back", func(h *history.History) { h.States[3].Attempt, h.States[3].Revision = 1, 7; h.States[2].Attempt = 2 }, "attempt: operation OP went from attempt 2 back to 1"},
		{"runs without an attempt", func(h *history.History) { h.States[2].Attempt = 0 }, "attempt: operation OP executes without"},
		{"a terminal is overwritten", func(h *history.History) {
			h.Records[0].Revision, h.Records[0].Response = 10, serialized(other)
		}, "overwritten: operation OP"},
		{"a done operation is queued again", func(h *history.History) {
			h.States = append(h.States, history.State{Operation: "OP", Action: "a", Revision: 8, Stage: repb.ExecutionStage_COMPLETED, Attempt: 2})
			h.States[0].Stage, h.Records[0].Stage = repb.ExecutionStage_QUEUED, repb.ExecutionStage_QUEUED
		}, "overwritten: operation OP"},
		{"two states of one revision", func(h *history.History) { h.States[0].Response = serialized(other) }, "revision: operation OP"},
		{"an operation is not done", func(h *history.History) {
			h.Records[0].Stage = repb.ExecutionStage_EXECUTING
			h.States[0] = h.Records[0]
		}, "not done: operation OP"},
		{"an operation has no record", func(h *history.History) { h.Records, h.Runs = nil, nil }, "lost: operation OP"},
		{"more runs than attempts", func(h *history.History) { h.Runs["a"] = 3 }, "runs: action a ran 3 times in 2 attempts"},
		{"an action of nobody ran", func(h *history.History) { h.Runs["b"] = 1 }, "runs: action b ran 1 times in 0 attempts"},
		{"success without a run", func(h *history.History) { h.Runs = nil }, "runs: action a succeeded and never ran"},
		{"a record that cannot be read", func(h *history.History) { h.Records[0].Response = "\xff"; h.States[0] = h.Records[0] }, "record: response of operation OP"},
		{"a blob is missing", func(h *history.History) { h.Found = nil }, "blobs: " + history.Text(output) + " of a result is missing"},
		{"a blob has other bytes", func(h *history.History) { h.Found[history.Text(output)] = "cd/3" }, "blobs: " + history.Text(output) + " of a result has the bytes of cd/3"},
		{"jobs", func(h *history.History) { h.Left.Jobs = 1 }, "left: 1 jobs"},
		{"held jobs", func(h *history.History) { h.Left.Held = 2 }, "left: 2 held jobs"},
		{"flights", func(h *history.History) { h.Left.Flights = 3 }, "left: 3 flights"},
		{"unacknowledged", func(h *history.History) { h.Left.Unacknowledged = 4 }, "left: 4 unacknowledged"},
		{"dead letters", func(h *history.History) { h.Left.Dead = []string{"OP"} }, "left: dead letter OP"},
		{"subscriptions", func(h *history.History) { h.Left.Subscriptions = []string{"jetfarm.status.OP"} }, "left: subscription jetfarm.status.OP"},
		{"processes", func(h *history.History) { h.Left.Processes = []string{"sh"} }, "left: process sh"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := clean()
			test.spoil(h)
			got := strings.Join(h.Check(), "\n")
			if !strings.Contains(got, test.want) {
				t.Errorf("violations:\n%s\nwant one with %q", got, test.want)
			}
		})
	}
}

// A farm that fails a thousand times in one way is told about in a few lines.
func TestManyViolationsAreCounted(t *testing.T) {
	h := clean()
	for range 1000 {
		h.Ask("late", "a")
	}
	if got := h.Check(); len(got) != 11 || !strings.Contains(got[10], "and 990 more") {
		t.Errorf("%d lines, the last is %q", len(got), got[len(got)-1])
	}
}

// What a client repeats is no violation, though the answer was a terminal one.
func TestRetriedTerminalIsNoViolation(t *testing.T) {
	h := clean()
	h.Asks[2].Streams = append([]*history.Stream{{Messages: []history.Message{
		{Operation: "refused-1", Stage: repb.ExecutionStage_COMPLETED, Done: true, Response: ended(codes.Unavailable)},
	}}}, h.Asks[2].Streams...)
	for _, violation := range h.Check() {
		t.Error(violation)
	}
}

// Waiters of one operation have names of their own: they are told the same end, but for those that have cancelled.
func TestWaitersOfOneOperation(t *testing.T) {
	const operation = "OPERATIONOPERATIONOPERATIO"
	other := proto.CloneOf(good)
	other.Result.ExecutionMetadata.Worker = "w2"
	told := func(waiter string, response *repb.ExecuteResponse) []*history.Stream {
		m := done(response)
		m.Operation = operation + "-" + waiter
		first := executing()
		first.Operation = m.Operation
		return []*history.Stream{{Messages: []history.Message{first, m}}}
	}
	for _, test := range []struct {
		name   string
		second *repb.ExecuteResponse
		want   string
	}{
		{"the same", good, ""},
		{"another", other, "two terminals: operation " + operation},
		{"cancelled", ended(codes.Canceled), "red: c2"}, // since nobody cancels in these histories
	} {
		t.Run(test.name, func(t *testing.T) {
			h := clean()
			h.Asks[0].Streams, h.Asks[1].Streams = told("AAAAAAAAAAAAA", good), told("BBBBBBBBBBBBB", test.second)
			for i := range h.States {
				h.States[i].Operation = operation
			}
			h.Records[0].Operation = operation
			got := strings.Join(h.Check(), "\n")
			if !strings.HasPrefix(got, test.want) || (got == "") != (test.want == "") || strings.Contains(got, "\n") {
				t.Errorf("violations:\n%s\nwant %q", got, test.want)
			}
		})
	}
}
