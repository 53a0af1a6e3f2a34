package broker

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// The errors of operations and leases.
var (
	// ErrNotFound reports an operation that never existed, was deleted, or finished longer ago than
	// operations are kept.
	ErrNotFound = errors.New("operation not found")
	// ErrQueueFull reports that the queue holds as many jobs as it may. The request may be repeated.
	ErrQueueFull = errors.New("queue is full")
	// ErrUnavailable reports a broker that did not answer. The request may be repeated.
	ErrUnavailable = errors.New("broker unavailable")
	// ErrNoWorker reports a platform that no live worker offers; the text says what comes nearest.
	ErrNoWorker = errors.New("no worker offers the platform")
	// ErrLost reports a lease that is over: another attempt or a terminal state was first.
	ErrLost = errors.New("lease lost")
	// ErrExhausted reports that the attempt that was given up was the last one: the operation has ended.
	ErrExhausted = errors.New("no attempt is left")
	// ErrCancelled reports a lease whose operation was cancelled.
	ErrCancelled = errors.New("operation cancelled")
)

// MaxResponse is the largest serialized ExecuteResponse that travels in a message. A larger one is
// stored as a blob and named by Outcome.ResponseBlob. It leaves room for the record around it within
// the 1 MiB that a stock server allows a message.
const MaxResponse = 900 << 10

// Operation is the state of an operation at one moment. It is never changed after it was handed out.
type Operation struct {
	// Name is the operation's name: unguessable, and valid as one subject token.
	Name string
	// Waiter is which of those that wait for the operation this is the state for; "" is all of them.
	Waiter string
	// Action is the digest of the action; its space gives the instance and the digest function.
	Action digest.Digest
	Stage  repb.ExecutionStage_Value
	// Attempt counts the workers that have begun the action; 0 until the first has.
	Attempt int
	// Worker is the one that began the current attempt.
	Worker   string
	Queued   time.Time
	Updated  time.Time
	Platform Platform
	// Pool and Lane say where the operation waits or waited. Held says, of what Active gives, that its turn to
	// enter the lane has not come.
	Pool     string
	Lane     int
	Held     bool
	Priority int32
	// Invocation is the client's tool_invocation_id, as it was sent.
	Invocation string
	// Failures are the attempts that failed for no fault of the action, at most MaxAttempts.
	Failures []Failure
	// Note says in a sentence why the operation is where it is, when there is something to say.
	Note string
	// Response is the serialized ExecuteResponse of a done operation, unless ResponseBlob names it.
	Response     []byte
	ResponseBlob digest.Digest
	// Revision rises with every change of the operation.
	Revision uint64

	// kept says that the output of a cancelled operation is in stdout and stderr.
	kept           bool
	stdout, stderr digest.Digest
}

// Done tells whether the operation is in its terminal state.
func (o *Operation) Done() bool { return o.Stage == repb.ExecutionStage_COMPLETED }

// blobRef is a digest on the wire.
type blobRef struct {
	Space string `json:"space"`
	Hash  string `json:"hash"`
	Size  int64  `json:"size"`
}

func refOf(d digest.Digest) *blobRef {
	if d.IsZero() {
		return nil
	}
	return &blobRef{Space: d.Space().Token(), Hash: d.Hash(), Size: d.Size()}
}

func (r *blobRef) digest() (digest.Digest, error) {
	if r == nil {
		return digest.Digest{}, nil
	}
	space, err := digest.ParseToken(r.Space)
	if err != nil {
		return digest.Digest{}, err
	}
	return space.New(r.Hash, r.Size)
}

// record is the payload of a message in OPERATIONS and in JOBS: one line of JSON, which ends with a
// newline, and then the serialized ExecuteResponse of a done operation as raw bytes. A job carries
// the record as it was created, with its revision, so that a worker need not read it.
type record struct {
	Operation       string                    `json:"operation"`
	Action          *blobRef                  `json:"action"`
	ActionData      []byte                    `json:"action_data,omitempty"`
	Stage           repb.ExecutionStage_Value `json:"stage"`
	Attempt         int                       `json:"attempt,omitempty"`
	Failures        []Failure                 `json:"failures,omitempty"`
	Worker          string                    `json:"worker,omitempty"`
	Limit           time.Duration             `json:"limit,omitempty"` // of how long the attempt may take
	Queued          time.Time                 `json:"queued"`
	Updated         time.Time                 `json:"updated"`
	Pool            string                    `json:"pool"`
	Lane            int                       `json:"lane"`
	Holder          string                    `json:"holder,omitempty"` // who lets the job in and hears when it is taken
	Platform        Platform                  `json:"platform,omitempty"`
	Priority        int32                     `json:"priority,omitempty"`
	SkipCacheLookup bool                      `json:"skip_cache_lookup,omitempty"`
	DoNotCache      bool                      `json:"do_not_cache,omitempty"`
	Metadata        []byte                    `json:"metadata,omitempty"`
	Invocation      string                    `json:"invocation,omitempty"`
	Flight          uint64                    `json:"flight,omitempty"`
	Unattended      bool                      `json:"unattended,omitempty"`
	Waiters         []string                  `json:"waiters,omitempty"`      // who were given a name
	MoreWaiters     bool                      `json:"more_waiters,omitempty"` // whether there are others than these
	Cancels         []string                  `json:"cancels,omitempty"`      // the waiters that have cancelled
	// Began is when the attempt began, by the broker's clock, once its record was changed for a waiter.
	Began        time.Time `json:"began,omitzero"`
	Note         string    `json:"note,omitempty"`
	ResponseBlob *blobRef  `json:"response_blob,omitempty"`
	Logs         *logRefs  `json:"logs,omitempty"`
	// Revision is set in jobs only; a record's own revision is its stream sequence.
	Revision uint64 `json:"revision,omitempty"`

	response []byte
	stored   time.Time // by the broker's clock
}

func (r *record) done() bool { return r.Stage == repb.ExecutionStage_COMPLETED }

func (r *record) encode() ([]byte, error) {
	line, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode operation %s: %w", r.Operation, err)
	}
	return append(append(line, '\n'), r.response...), nil
}

func decodeRecord(payload []byte) (*record, error) {
	line, response, ok := bytes.Cut(payload, []byte{'\n'})
	r := new(record)
	if !ok {
		return nil, errors.New("decode operation record: no newline after the header")
	}
	if err := json.Unmarshal(line, r); err != nil {
		return nil, fmt.Errorf("decode operation record: %w", err)
	}
	if len(response) > 0 {
		r.response = response
	}
	return r, nil
}

// snapshot returns the record as the rest of the farm sees it.
func (r *record) snapshot(revision uint64) (*Operation, error) {
	action, err := r.Action.digest()
	if err != nil {
		return nil, fmt.Errorf("operation %s: action: %w", r.Operation, err)
	}
	blob, err := r.ResponseBlob.digest()
	if err != nil {
		return nil, fmt.Errorf("operation %s: response: %w", r.Operation, err)
	}
	stdout, err := r.Logs.of(Stdout)
	if err != nil {
		return nil, fmt.Errorf("operation %s: stdout: %w", r.Operation, err)
	}
	stderr, err := r.Logs.of(Stderr)
	if err != nil {
		return nil, fmt.Errorf("operation %s: stderr: %w", r.Operation, err)
	}
	return &Operation{
		Name: r.Operation, Action: action, Stage: r.Stage, Attempt: r.Attempt, Worker: r.Worker,
		Queued: r.Queued, Updated: r.Updated, Platform: r.Platform, Pool: r.Pool, Lane: r.Lane, Priority: r.Priority,
		Invocation: r.Invocation, Failures: r.Failures, Note: r.Note, Response: r.response, ResponseBlob: blob, Revision: revision,
		kept: r.Logs != nil, stdout: stdout, stderr: stderr,
	}, nil
}

// nameLength is what crypto/rand.Text gives: base32 of at least 128 bits.
const nameLength = 26

// newName returns a fresh operation name with 130 random bits.
func newName() string { return rand.Text() }

// validName tells whether name has the form that newName gives.
func validName(name string) bool {
	return len(name) == nameLength && isBase32(name)
}

func isBase32(text string) bool {
	for _, c := range []byte(text) {
		if (c < 'A' || c > 'Z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}
