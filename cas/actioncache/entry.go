package actioncache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
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

func subject(action digest.Digest) string {
	return subjectPrefix + action.Space().Token() + "." + action.Hash() + "." + strconv.FormatInt(action.Size(), 10)
}

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

func (c *Cache) read(ctx context.Context, action digest.Digest) (entry, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	m, err := c.stream.GetLastMsgForSubject(ctx, subject(action))
	if errors.Is(err, jetstream.ErrMsgNotFound) || (err == nil && m.Header.Get("KV-Operation") != "") {
		return entry{}, fmt.Errorf("%w for %v", ErrNotFound, action)
	}
	if err != nil {
		return entry{}, fmt.Errorf("reading the result of %v: %w", action, failure(ctx, err))
	}
	return entry{value: m.Data, sequence: m.Sequence, written: m.Time}, nil
}

func (c *Cache) write(ctx context.Context, action digest.Digest, value []byte, opts ...jetstream.PublishOpt) error {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	if _, err := c.js.Publish(ctx, subject(action), value, opts...); err != nil {
		return failure(ctx, err)
	}
	return nil
}

// touch writes an old entry again, unless somebody else has written it (row ACG-12).
func (c *Cache) touch(ctx context.Context, action digest.Digest, e entry) {
	if time.Since(e.written) < c.refresh {
		return
	}
	if err := c.write(ctx, action, e.value, jetstream.WithExpectLastSequencePerSubject(e.sequence)); err != nil {
		c.log.DebugContext(ctx, "cached result was not refreshed", "action", action, "err", err)
	}
}

// remove deletes this entry and not one that was written since.
func (c *Cache) remove(ctx context.Context, action digest.Digest, e entry) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	if err := c.stream.DeleteMsg(ctx, e.sequence); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		c.log.WarnContext(ctx, "damaged cached result was not deleted", "action", action, "err", err)
	}
}

// encode returns the value for a result, which it stores as a blob when it is large.
func (c *Cache) encode(ctx context.Context, space digest.Space, result *repb.ActionResult) ([]byte, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte{formInline}, result)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if len(data) <= c.maxEntry {
		return data, nil
	}
	data = data[1:]
	if len(data) > maxResult {
		return nil, fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrInvalid, len(data), maxResult)
	}
	d := space.Of(data)
	if err := c.blobs.Put(ctx, d, bytes.NewReader(data)); err != nil {
		return nil, fmt.Errorf("storing the action result as a blob: %w", err)
	}
	return proto.MarshalOptions{}.MarshalAppend([]byte{formBlob}, d.Proto())
}

// decode is the inverse of encode.
func (c *Cache) decode(ctx context.Context, space digest.Space, value []byte) (*repb.ActionResult, error) {
	if len(value) == 0 {
		return nil, fmt.Errorf("%w: the entry is empty", ErrInvalid)
	}
	form, data := value[0], value[1:]
	switch form {
	case formInline:
	case formBlob:
		var err error
		if data, err = c.resultBlob(ctx, space, data); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: the entry has the unknown form %d", ErrInvalid, form)
	}
	result := new(repb.ActionResult)
	if err := proto.Unmarshal(data, result); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return result, nil
}

func (c *Cache) resultBlob(ctx context.Context, space digest.Space, reference []byte) ([]byte, error) {
	var m repb.Digest
	if err := proto.Unmarshal(reference, &m); err != nil {
		return nil, fmt.Errorf("%w: reference to a blob: %w", ErrInvalid, err)
	}
	d, err := space.Parse(&m)
	if err != nil {
		return nil, fmt.Errorf("%w: reference to a blob: %w", ErrInvalid, err)
	}
	if d.Size() > maxResult {
		return nil, fmt.Errorf("%w: reference to a blob of %d bytes", ErrInvalid, d.Size())
	}
	data, err := cas.ReadAll(ctx, c.blobs, d, maxResult)
	if lost(err) {
		return nil, &MissingError{Missing: []digest.Digest{d}}
	}
	return data, err
}

// lost tells a blob that is gone or damaged, which is the same for who needs it.
func lost(err error) bool { return errors.Is(err, cas.ErrNotFound) || errors.Is(err, cas.ErrMismatch) }
