package actioncache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// The first byte of a value.
const (
	formInline = 1
	formBlob   = 2
)

const subjectPrefix = "$KV." + bucket + "."

func subject(action digest.Digest) string { return subjectPrefix + key(action) }

var errNoAnswer = fmt.Errorf("%w: no answer from the broker within %v", cas.ErrUnavailable, requestTimeout)

// failure is the error of a request: the cause of ctx if that is why, else one of package cas.
func failure(ctx context.Context, err error) error {
	var api *jetstream.APIError
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &api) && (api.ErrorCode == 10023 || api.ErrorCode == 10047 || api.ErrorCode == 10077):
		// The broker's insufficient resources, storage exceeded and maximum bytes exceeded.
		return fmt.Errorf("%w: %w", cas.ErrFull, err)
	default:
		return fmt.Errorf("%w: %w", cas.ErrUnavailable, err)
	}
}

// entry is what the bucket has under a key.
type entry struct {
	value    []byte
	sequence uint64
	written  time.Time
}

// read asks the broker.
func (c *Cache) read(ctx context.Context, action digest.Digest) (*known, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	m, err := c.stream.GetLastMsgForSubject(ctx, subject(action))
	if errors.Is(err, jetstream.ErrMsgNotFound) || (err == nil && m.Header.Get("KV-Operation") != "") {
		return nil, fmt.Errorf("%w for %v", ErrNotFound, action)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the result of %v: %w", action, failure(ctx, err))
	}
	return &known{entry: entry{value: m.Data, sequence: m.Sequence, written: m.Time}}, nil
}

// write returns the sequence of the new entry.
func (c *Cache) write(ctx context.Context, action digest.Digest, value []byte, opts ...jetstream.PublishOpt) (uint64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	ack, err := c.js.Publish(ctx, subject(action), value, opts...)
	if err != nil {
		return 0, failure(ctx, err)
	}
	return ack.Sequence, nil
}

// touch writes an old entry again, unless somebody else has written it (row ACG-12).
func (c *Cache) touch(ctx context.Context, action digest.Digest, k *known) {
	if time.Since(k.written) < c.refresh {
		return
	}
	now := *k
	now.written = time.Now()
	_, epoch := c.kept(action, now.written)
	var err error
	if now.sequence, err = c.write(ctx, action, k.value, jetstream.WithExpectLastSequencePerSubject(k.sequence)); err != nil {
		c.doubt(action)
		c.log.DebugContext(ctx, "cached result was not refreshed", "action", action, "err", err)
		return
	}
	c.keep(action, &now, epoch, now.written)
}

// remove deletes this entry and not one that was written since.
func (c *Cache) remove(ctx context.Context, action digest.Digest, k *known) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	if err := c.stream.DeleteMsg(ctx, k.sequence); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		c.log.WarnContext(ctx, "damaged cached result was not deleted", "action", action, "err", err)
	}
}

// encode returns the entry for a result, which it stores as a blob when it is large. n has what the
// result names.
func (c *Cache) encode(ctx context.Context, n *named, result *repb.ActionResult) (*known, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte{formInline}, result)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	k := &known{entry: entry{value: data}, result: data[1:], blobs: n.asked, whole: !n.split}
	if len(data) <= c.maxEntry {
		return k, nil
	}
	if len(k.result) > maxResult {
		return nil, fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrInvalid, len(k.result), maxResult)
	}
	d := n.space.Of(k.result)
	if err := c.blobs.Put(ctx, d, bytes.NewReader(k.result)); err != nil {
		return nil, fmt.Errorf("storing the action result as a blob: %w", err)
	}
	k.blobs = append(k.blobs, d)
	k.value, err = proto.MarshalOptions{}.MarshalAppend([]byte{formBlob}, d.Proto())
	return k, err
}

// open decodes an entry and checks it, and adds to it what that brought to light.
func (c *Cache) open(ctx context.Context, space digest.Space, k *known) (*repb.ActionResult, error) {
	if len(k.value) == 0 {
		return nil, fmt.Errorf("%w: the entry is empty", ErrInvalid)
	}
	n := c.names(space)
	switch form := k.value[0]; form {
	case formInline:
		k.result = k.value[1:]
	case formBlob:
		var err error
		if k.result, err = n.resultBlob(ctx, k.value[1:]); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: the entry has the unknown form %d", ErrInvalid, form)
	}
	result := new(repb.ActionResult)
	if err := proto.Unmarshal(k.result, result); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := n.complete(ctx, result); err != nil {
		return nil, err
	}
	k.blobs, k.whole = n.asked, !n.split
	return result, nil
}

// again returns the result of an entry that was opened before, if its blobs are still there.
func (c *Cache) again(ctx context.Context, k *known) (*repb.ActionResult, error) {
	missing, err := cas.Confirm(ctx, c.blobs, k.blobs)
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, &MissingError{Missing: missing}
	}
	result := new(repb.ActionResult)
	if err := proto.Unmarshal(k.result, result); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return result, nil
}

// resultBlob returns what a reference to a blob stands for.
func (n *named) resultBlob(ctx context.Context, reference []byte) ([]byte, error) {
	var m repb.Digest
	if err := proto.Unmarshal(reference, &m); err != nil {
		return nil, fmt.Errorf("%w: reference to a blob: %w", ErrInvalid, err)
	}
	d, err := n.space.Parse(&m)
	if err != nil {
		return nil, fmt.Errorf("%w: reference to a blob: %w", ErrInvalid, err)
	}
	if d.Size() > maxResult {
		return nil, fmt.Errorf("%w: reference to a blob of %d bytes", ErrInvalid, d.Size())
	}
	data, err := cas.ReadAll(ctx, n.blobs, d, maxResult)
	if lost(err) {
		return nil, &MissingError{Missing: []digest.Digest{d}}
	}
	if err != nil {
		return nil, err
	}
	return data, n.addDigest(ctx, d) // The question is what extends its life.
}

// lost tells a blob that is gone or damaged, which is the same for who needs it.
func lost(err error) bool { return errors.Is(err, cas.ErrNotFound) || errors.Is(err, cas.ErrMismatch) }
