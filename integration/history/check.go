package history

import (
	"cmp"
	"fmt"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
)

// maxTold bounds how many violations of one rule are told in full.
const maxTold = 10

// verdict collects violations by rule.
type verdict struct {
	rules []string
	told  map[string][]string
	more  map[string]int
}

func (v *verdict) add(rule, format string, args ...any) {
	if v.told == nil {
		v.told, v.more = map[string][]string{}, map[string]int{}
	}
	if _, ok := v.told[rule]; !ok {
		v.rules = append(v.rules, rule)
	}
	if len(v.told[rule]) == maxTold {
		v.more[rule]++
		return
	}
	v.told[rule] = append(v.told[rule], rule+": "+fmt.Sprintf(format, args...))
}

func (v *verdict) lines() []string {
	var all []string
	for _, rule := range v.rules {
		all = append(all, v.told[rule]...)
		if v.more[rule] > 0 {
			all = append(all, fmt.Sprintf("%s: and %d more", rule, v.more[rule]))
		}
	}
	return all
}

// Check returns a sentence for each violation, none for a history as it should be. It is called when
// nothing writes the history any more.
func (h *History) Check() []string {
	v := &verdict{}
	for _, a := range h.Asks {
		h.checkAsk(v, a)
	}
	h.checkTerminals(v)
	h.checkStates(v)
	h.checkRecords(v)
	h.checkRuns(v)
	h.checkBlobs(v)
	h.checkLeft(v)
	return v.lines()
}

// checkAsk: every ask ends once, with the success of its action.
func (h *History) checkAsk(v *verdict, a *Ask) {
	who := fmt.Sprintf("%s, action %s", a.Client, a.Action)
	if a.Failed != "" {
		v.add("refused", "%s: %s", who, a.Failed)
	}
	var last *repb.ExecuteResponse
	for i, s := range a.Streams {
		checkStream(v, fmt.Sprintf("%s, stream %d", who, i+1), s)
		if last != nil && !Retryable(status.FromProto(last.GetStatus()).Code()) {
			v.add("asked again", "%s: stream %d follows a final answer", who, i+1)
		}
		last = nil
		if n := len(s.Messages); n > 0 {
			last = s.Messages[n-1].Response
		}
	}
	switch {
	case last == nil:
		v.add("not ended", "%s: no terminal state after %d streams", who, len(a.Streams))
	case last.GetStatus().GetCode() != 0:
		v.add("red", "%s: %v", who, last.GetStatus())
	case last.GetResult().GetExitCode() != 0:
		v.add("red", "%s: exit code %d", who, last.GetResult().GetExitCode())
	}
}

// checkStream: one operation, legal stages, nothing after the end, and an end that clients understand.
func checkStream(v *verdict, who string, s *Stream) {
	name, done := s.Waited, false
	for _, m := range s.Messages {
		if done {
			v.add("after the end", "%s: operation %s went on in stage %v", who, m.Operation, m.Stage)
		}
		if name == "" {
			name = m.Operation
		}
		if m.Operation != name {
			v.add("other operation", "%s: %s instead of %s", who, m.Operation, name)
		}
		if m.Done != (m.Stage == repb.ExecutionStage_COMPLETED) {
			v.add("stage", "%s: operation %s is done %v in stage %v", who, m.Operation, m.Done, m.Stage)
		}
		if m.Stage == repb.ExecutionStage_UNKNOWN {
			v.add("stage", "%s: operation %s has no stage", who, m.Operation)
		}
		done = done || m.Done
	}
	switch {
	case s.GaveUp, Retryable(s.End):
	case s.End == codes.NotFound && s.Waited != "" && len(s.Messages) == 0:
	case s.End == codes.OK && !done:
		v.add("ended early", "%s: operation %s", who, name)
	case s.End != codes.OK:
		v.add("end", "%s: %v, which clients do not repeat", who, s.End)
	}
}

// checkTerminals: whoever is told the end of an operation is told the same, and of a waiter's name always the
// same. Waiters that have cancelled for themselves are told that.
func (h *History) checkTerminals(v *verdict) {
	first := map[string]*repb.ExecuteResponse{}
	same := func(name string, response *repb.ExecuteResponse) {
		if other, ok := first[name]; !ok {
			first[name] = response
		} else if !proto.Equal(other, response) {
			v.add("two terminals", "operation %s: %v and %v", name, other, response)
		}
	}
	for _, a := range h.Asks {
		for _, s := range a.Streams {
			for _, m := range s.Messages {
				if !m.Done {
					continue
				}
				same(m.Operation, m.Response)
				if operation := broker.OperationOf(m.Operation); operation != m.Operation && status.FromProto(m.Response.GetStatus()).Code() != codes.Canceled {
					same(operation, m.Response)
				}
			}
		}
	}
}

// checkStates: attempts never fall, and the first terminal state stays.
func (h *History) checkStates(v *verdict) {
	byOperation := map[string][]State{}
	for _, s := range slices.Concat(h.States, h.Records) {
		byOperation[s.Operation] = append(byOperation[s.Operation], s)
	}
	for _, name := range sortedKeys(byOperation) {
		states := byOperation[name]
		slices.SortStableFunc(states, func(a, b State) int { return cmp.Compare(a.Revision, b.Revision) })
		for i, s := range states {
			if s.Stage == repb.ExecutionStage_EXECUTING && s.Attempt == 0 {
				v.add("attempt", "operation %s executes without an attempt", name)
			}
			if i > 0 {
				checkChange(v, states[i-1], s)
			}
		}
	}
}

func checkChange(v *verdict, before, now State) {
	if now.Revision == before.Revision && now != before {
		v.add("revision", "operation %s has two states with the revision %d", now.Operation, now.Revision)
	}
	if now.Attempt < before.Attempt {
		v.add("attempt", "operation %s went from attempt %d back to %d", now.Operation, before.Attempt, now.Attempt)
	}
	if before.Stage == repb.ExecutionStage_COMPLETED && (now.Stage != before.Stage || now.Response != before.Response) {
		v.add("overwritten", "operation %s was done and changed", now.Operation)
	}
}

// checkRecords: every operation that a client heard of is recorded and done, and as it was told.
func (h *History) checkRecords(v *verdict) {
	records := map[string]State{}
	for _, r := range h.Records {
		records[r.Operation] = r
		if r.Stage != repb.ExecutionStage_COMPLETED {
			v.add("not done", "operation %s of action %s is in stage %v", r.Operation, r.Action, r.Stage)
		}
	}
	heard := map[string]bool{}
	for _, s := range h.States {
		heard[s.Operation] = true
	}
	for _, a := range h.Asks {
		for _, s := range a.Streams {
			for _, m := range s.Messages {
				// What was answered at once, from the cache or by a refusal, is no operation of the broker.
				if !m.Done || len(s.Messages) > 1 || s.Waited != "" {
					heard[broker.OperationOf(m.Operation)] = true
				}
			}
		}
	}
	for _, name := range sortedKeys(heard) {
		if _, ok := records[name]; !ok {
			v.add("lost", "operation %s has no record", name)
		}
	}
}

// checkRuns: no action ran more often than a worker began it, and what succeeded has run.
func (h *History) checkRuns(v *verdict) {
	attempts := map[string]int{}
	for _, r := range h.Records {
		attempts[r.Action] += r.Attempt
	}
	for _, action := range sortedKeys(h.Runs) {
		if h.Runs[action] > attempts[action] {
			v.add("runs", "action %s ran %d times in %d attempts", action, h.Runs[action], attempts[action])
		}
	}
	for _, r := range h.Records {
		if response := r.response(v); response.GetStatus().GetCode() == 0 && response.GetResult() != nil && h.Runs[r.Action] == 0 {
			v.add("runs", "action %s succeeded and never ran", r.Action)
		}
	}
}

// checkBlobs: what a result names is there.
func (h *History) checkBlobs(v *verdict) {
	for _, d := range h.Wanted() {
		switch found := h.Found[Text(d)]; found {
		case Text(d):
		case "":
			v.add("blobs", "%s of a result is missing", Text(d))
		default:
			v.add("blobs", "%s of a result has the bytes of %s", Text(d), found)
		}
	}
}

// checkLeft: nothing waits, runs or watches when nobody wants anything.
func (h *History) checkLeft(v *verdict) {
	for _, n := range []struct {
		what string
		n    int
	}{{"jobs", h.Left.Jobs}, {"held jobs", h.Left.Held}, {"flights", h.Left.Flights}, {"unacknowledged jobs", h.Left.Unacknowledged}} {
		if n.n != 0 {
			v.add("left", "%d %s", n.n, n.what)
		}
	}
	for what, names := range map[string][]string{"dead letter": h.Left.Dead, "subscription": h.Left.Subscriptions, "process": h.Left.Processes} {
		for _, name := range names {
			v.add("left", "%s %s", what, name)
		}
	}
}

// response reads the response of a done state.
func (s *State) response(v *verdict) *repb.ExecuteResponse {
	response := new(repb.ExecuteResponse)
	if err := proto.Unmarshal([]byte(s.Response), response); err != nil {
		v.add("record", "response of operation %s: %v", s.Operation, err)
	}
	return response
}

// responses returns all that clients were told and the broker has.
func (h *History) responses() []*repb.ExecuteResponse {
	var all []*repb.ExecuteResponse
	for _, a := range h.Asks {
		for _, s := range a.Streams {
			for _, m := range s.Messages {
				if m.Response != nil {
					all = append(all, m.Response)
				}
			}
		}
	}
	for _, r := range h.Records {
		all = append(all, r.response(&verdict{}))
	}
	return all
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
