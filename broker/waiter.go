package broker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Equal requests in flight share an operation, and each Execute is a waiter of it, with a name of its own:
// `{operation}-{waiter}`. What one waiter cancels ends for this waiter alone, and for all when no other has
// been given a name. Both are in the operation's record: a cancel is one compare-and-set, so it and the
// action's end have an order; it reaches every watcher as a state does, and is not lost when a message is;
// and it is kept for as long as the operation is.
//
// Rejected: a record for each cancelled waiter, which every watcher would have to read before it tells an
// end; and asking who watches at the time of a cancel, which a client that is between two streams does not
// answer.

const (
	// waiterLength is that of a waiter: 65 random bits of base32.
	waiterLength = 13
	// maxWaiters bounds the waiters that a record lists. An operation with more does not end before its
	// last watcher has left.
	maxWaiters = 16
	// maxCancels bounds the waiters of one operation that may cancel for themselves; every watcher is sent
	// their list with each state.
	maxCancels = 256

	cancelledText = "the operation was cancelled"
)

// ErrTooManyCancels reports an operation of which so many waiters have cancelled that no more can be noted.
var ErrTooManyCancels = errors.New("too many waiters of the operation have cancelled")

// newWaiter returns a fresh name for a waiter of an operation.
func newWaiter() string { return rand.Text()[:waiterLength] }

// OperationOf returns the operation that a waiter's name belongs to; another name as it is.
func OperationOf(name string) string {
	if operation, _, ok := parseName(name); ok {
		return operation
	}
	return name
}

// parseName splits the name of a waiter, which has an empty one in the operation's own name. Names of other
// forms are not found without asking, so nothing that a client sends becomes part of a subject.
func parseName(name string) (operation, waiter string, ok bool) {
	operation, waiter, suffixed := strings.Cut(name, "-")
	if !validName(operation) || suffixed && (len(waiter) != waiterLength || !isBase32(waiter)) {
		return "", "", false
	}
	return operation, waiter, true
}

// WaiterName is the name of the operation for whom it was handed out to: a waiter's, or the operation's own.
func (o *Operation) WaiterName() string {
	if o.Waiter == "" {
		return o.Name
	}
	return o.Name + "-" + o.Waiter
}

// snapshotFor is snapshot as a waiter sees it: one that has cancelled sees the end.
func (r *record) snapshotFor(waiter string, revision uint64) (*Operation, error) {
	if waiter != "" && !r.mayKnow(waiter) {
		return nil, fmt.Errorf("%w: %s-%s", ErrNotFound, r.Operation, waiter)
	}
	op, err := r.snapshot(revision)
	if err != nil {
		return nil, err
	}
	op.Waiter = waiter
	if slices.Contains(r.Cancels, waiter) {
		op.Stage, op.Note = repb.ExecutionStage_COMPLETED, cancelledText
		op.Response, op.ResponseBlob = statusResponse(code.Code_CANCELLED, cancelledText), digest.Digest{}
	}
	return op, nil
}

// waiter is the one for whom a record was made, or "".
func (r *record) waiter() string {
	if len(r.Waiters) == 0 {
		return ""
	}
	return r.Waiters[0]
}

// mayKnow tells whether a waiter may be one of the operation, which is certain only when all are listed.
func (r *record) mayKnow(waiter string) bool {
	return r.MoreWaiters || len(r.Waiters) == 0 || slices.Contains(r.Waiters, waiter)
}

// admit adds a waiter, and tells whether that changed anything. Who submitted an operation that lists nobody
// has no name to cancel by, so there is always somebody else.
func (r *record) admit(waiter string) bool {
	switch {
	case r.MoreWaiters, slices.Contains(r.Waiters, waiter):
		return false
	case waiter == "", len(r.Waiters) == 0, len(r.Waiters) == maxWaiters:
		r.MoreWaiters = true
	default:
		r.Waiters = append(r.Waiters, waiter)
	}
	r.keepBegan()
	return true
}

// keepBegan keeps a change for a waiter from being taken for the beginning of the attempt.
func (r *record) keepBegan() {
	if r.Stage == repb.ExecutionStage_EXECUTING {
		r.Began = r.began()
	}
}

// cancelFor notes that a waiter has cancelled, and ends the operation when no other is left. Those that have
// only left are: they may come back.
func (r *record) cancelFor(waiter string) error {
	switch {
	case !r.mayKnow(waiter):
		return fmt.Errorf("%w: %s-%s", ErrNotFound, r.Operation, waiter)
	case r.done(), slices.Contains(r.Cancels, waiter):
		return errUnchanged
	case len(r.Cancels) == maxCancels:
		return fmt.Errorf("%w: %d of %s; close the stream instead", ErrTooManyCancels, maxCancels, r.Operation)
	}
	r.Cancels = append(r.Cancels, waiter)
	r.keepBegan()
	if !r.MoreWaiters && len(r.Waiters) > 0 && len(r.Cancels) == len(r.Waiters) {
		r.finish(code.Code_CANCELLED, cancelledText)
	}
	return nil
}

// join makes a waiter, or with "" somebody who is not listed, one of those that an operation runs for,
// unless it has ended. r is its record as of revision.
func (c *Client) join(ctx context.Context, r *record, revision uint64, waiter string) (joined bool, err error) {
	operation, failed := r.Operation, 0
	for attempt := 0; ; attempt++ {
		if err == nil {
			if r.done() {
				return false, nil
			}
			if !r.admit(waiter) {
				return true, nil
			}
			if _, err = c.write(ctx, r, revision); err == nil {
				return true, nil
			}
		}
		switch {
		case errors.Is(err, ErrNotFound):
			return false, nil
		case errors.Is(err, errConflict): // somebody else has got on
		case isUnavailable(err):
			failed++
		default:
			return false, err
		}
		if attempt >= maxJoinTries {
			return false, unavailable(err)
		}
		if err := pause(ctx, failed); err != nil {
			return false, err
		}
		r, revision, err = c.read(ctx, operation)
	}
}

// maxJoinTries outlasts the others that join at the same time, of which maxWaiters at most write.
const maxJoinTries = 2 * maxWaiters

// Cancel ends an operation with the status CANCELLED: by its own name for everyone, by that of a waiter for
// this one, and for everyone when all other waiters have cancelled. A queued one will then not run, a running
// one is killed by its worker. It is nil when the operation is already done. The error wraps ErrNotFound,
// ErrTooManyCancels or ErrUnavailable.
func (c *Client) Cancel(ctx context.Context, name string) error {
	operation, waiter, ok := parseName(name)
	switch {
	case !ok:
		return fmt.Errorf("%w: %.64q", ErrNotFound, name)
	case waiter == "":
		return c.end(ctx, operation, code.Code_CANCELLED, cancelledText)
	}
	goesOn := false
	err := c.endBy(ctx, operation, func(r *record) error {
		err := r.cancelFor(waiter)
		goesOn = !r.done()
		return err
	})
	if err == nil && goesOn {
		c.departed.add(operation)
	}
	return err
}
