package history

import (
	"fmt"
	"slices"
	"sync"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
)

// A Message is one message of an Execute or WaitExecution stream.
type Message struct {
	Operation string // by the name that the client was given
	Stage     repb.ExecutionStage_Value
	Done      bool
	Response  *repb.ExecuteResponse // of a done one
}

// MessageOf reads what a stream sent.
func MessageOf(op *longrunningpb.Operation) (Message, error) {
	m := Message{Operation: op.GetName(), Done: op.GetDone()}
	metadata := new(repb.ExecuteOperationMetadata)
	if err := op.GetMetadata().UnmarshalTo(metadata); err != nil {
		return m, fmt.Errorf("metadata of operation %s: %w", m.Operation, err)
	}
	m.Stage = metadata.GetStage()
	if m.Done {
		m.Response = new(repb.ExecuteResponse)
		if err := op.GetResponse().UnmarshalTo(m.Response); err != nil {
			return m, fmt.Errorf("response of operation %s: %w", m.Operation, err)
		}
	}
	return m, nil
}

// A Stream is one call that follows an operation.
type Stream struct {
	Waited   string // the operation that WaitExecution was asked for; empty for Execute
	Messages []Message
	End      codes.Code
	// GaveUp says that the client ended it, because it heard nothing for as long as it waits.
	GaveUp bool
}

// An Ask is one client's wish for one action, with all the streams that it took. Only that client
// changes it.
type Ask struct {
	Client, Action string
	Streams        []*Stream
	// Failed says why the client could not go on beside its streams, such as an upload that was refused.
	Failed string
}

// A State is an operation as the broker has it.
type State struct {
	Operation string
	Action    string // the name of its action, which Asks and Runs have as well
	Revision  uint64
	Stage     repb.ExecutionStage_Value
	Attempt   int
	Response  string // the serialized ExecuteResponse of a done one
}

// Left is what there is when nobody wants anything any more.
type Left struct {
	Jobs, Held, Flights int
	Unacknowledged      int      // deliveries that consumers wait for
	Dead                []string // operations that were set aside
	Subscriptions       []string // of watchers
	Processes           []string // of actions
}

// Empty tells whether nothing is left that goes away by itself.
func (l *Left) Empty() bool {
	return l.Jobs+l.Held+l.Flights+l.Unacknowledged+len(l.Subscriptions)+len(l.Processes) == 0
}

// A History is what there is to be checked.
type History struct {
	mu     sync.Mutex // guards Asks and States while clients run
	Asks   []*Ask
	States []State // what was seen on the way, in any order and with gaps

	Records []State           // the last state of each operation
	Runs    map[string]int    // how often each action ran, by its own account
	Found   map[string]string // for each digest of Wanted, that of the bytes which were read; empty for none
	Left    Left
}

// Ask begins an ask.
func (h *History) Ask(client, action string) *Ask {
	h.mu.Lock()
	defer h.mu.Unlock()
	a := &Ask{Client: client, Action: action}
	h.Asks = append(h.Asks, a)
	return a
}

// Saw adds a state.
func (h *History) Saw(s State) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.States = append(h.States, s)
}

// Retryable tells whether clients repeat a call that ended so.
func Retryable(code codes.Code) bool {
	return code == codes.Unavailable || code == codes.ResourceExhausted || code == codes.Aborted
}

// Text is a digest as a key of Found.
func Text(d *repb.Digest) string { return fmt.Sprintf("%s/%d", d.GetHash(), d.GetSizeBytes()) }

// Wanted returns the digests of all blobs that results which are OK name, each once.
func (h *History) Wanted() []*repb.Digest {
	seen := map[string]*repb.Digest{}
	for _, response := range h.responses() {
		if response.GetStatus().GetCode() != 0 {
			continue
		}
		for _, d := range blobsOf(response.GetResult()) {
			seen[Text(d)] = d
		}
	}
	wanted := make([]*repb.Digest, 0, len(seen))
	for _, d := range seen {
		wanted = append(wanted, d)
	}
	slices.SortFunc(wanted, func(a, b *repb.Digest) int { return slices.Compare([]string{Text(a)}, []string{Text(b)}) })
	return wanted
}

func blobsOf(result *repb.ActionResult) []*repb.Digest {
	var blobs []*repb.Digest
	add := func(d *repb.Digest) {
		if d.GetSizeBytes() > 0 {
			blobs = append(blobs, d)
		}
	}
	add(result.GetStdoutDigest())
	add(result.GetStderrDigest())
	for _, f := range result.GetOutputFiles() {
		add(f.GetDigest())
	}
	for _, d := range result.GetOutputDirectories() {
		add(d.GetTreeDigest())
	}
	return blobs
}
