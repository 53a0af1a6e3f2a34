package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// logs serves the outputs of operations to ByteStream.Read, while their actions run and after that.
// They have the form of LogStream resources, whose writers are the farm's workers alone.
type logs struct {
	broker  *broker.Client
	answers *answers
	blobs   cas.Store
	waiters *waiters
	readers slots
}

func newLogs(cfg Config, ans *answers, w *waiters) *logs {
	return &logs{
		broker: cfg.Broker, answers: ans, blobs: cfg.Blobs, waiters: w,
		readers: slots{what: "readers of logs", most: int64(cfg.Limits.MaxLogReaders)},
	}
}

// logName is the meaning of `{instance/}operations/{operation}/logstreams/{stdout or stderr}`.
type logName struct {
	instance, operation string
	stream              broker.LogStream
}

func (n logName) String() string {
	prefix := ""
	if n.instance != "" {
		prefix = n.instance + "/"
	}
	return prefix + "operations/" + n.operation + "/logstreams/" + string(n.stream)
}

// logNames returns the stream names of an operation that has run, or none (row OPS-8).
func logNames(op *broker.Operation) (stdout, stderr string) {
	if op.Attempt == 0 {
		return "", ""
	}
	name := logName{instance: op.Action.Space().Instance(), operation: op.Name}
	name.stream = broker.Stdout
	stdout = name.String()
	name.stream = broker.Stderr
	return stdout, name.String()
}

// parseLog tells whether a resource is one of a log stream, and which. A name with anything after the
// stream, as one to write would have, is an error (row LOG-2).
func parseLog(resource string) (name logName, ours bool, err error) {
	if !strings.Contains(resource, "/logstreams") || len(resource) > 2*digest.MaxInstance {
		return name, false, nil
	}
	segments := strings.Split(resource, "/")
	at := slices.IndexFunc(segments, func(s string) bool {
		return s == "operations" || s == "uploads" || s == "blobs" || s == "compressed-blobs"
	})
	if at < 0 || segments[at] != "operations" || len(segments) < at+3 || segments[at+2] != "logstreams" {
		return name, false, nil
	}
	if len(segments) != at+4 {
		return name, true, fmt.Errorf("%w: resource name %s is not {instance/}operations/{operation}/logstreams/{stdout or stderr}", errInvalid, digest.Quote(resource))
	}
	name = logName{instance: strings.Join(segments[:at], "/"), operation: segments[at+1], stream: broker.LogStream(segments[at+3])}
	if name.stream != broker.Stdout && name.stream != broker.Stderr {
		return name, true, fmt.Errorf("%w: log stream %s is neither stdout nor stderr", errInvalid, digest.Quote(segments[at+3]))
	}
	return name, true, nil
}

// read sends an output from an offset on and ends when the operation is done (row LOG-3).
func (l *logs) read(name logName, req *bytestream.ReadRequest, b *byteStream, stream bytestream.ByteStream_ReadServer) error {
	offset, limit := req.GetReadOffset(), req.GetReadLimit()
	if offset < 0 {
		return fmt.Errorf("%w: read_offset %d is negative", errRange, offset)
	}
	if limit < 0 {
		return fmt.Errorf("%w: read_limit %d is negative", errInvalid, limit)
	}
	if err := l.readers.take(); err != nil {
		return err
	}
	defer l.readers.release()
	ctx, leave, err := l.waiters.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	op, err := l.broker.Get(ctx, name.operation)
	if err == nil && op.Action.Space().Instance() != name.instance {
		err = fmt.Errorf("%w: %s", broker.ErrNotFound, name.operation)
	}
	if err != nil {
		return endOf(ctx, err)
	}
	if limit == 0 {
		limit = math.MaxInt64
	}
	sink := &download{stream: stream, chunks: b.chunks, left: limit}
	err = l.follow(ctx, name, offset, sink)
	b.metrics.sent.WithLabelValues("log").Add(float64(sink.sent))
	if errors.Is(err, errEnough) {
		return nil
	}
	return endOf(ctx, err)
}

// follow writes an output to sink, from the worker that runs the operation and then from the blob that
// it has become.
func (l *logs) follow(ctx context.Context, name logName, begin int64, sink io.Writer) error {
	for part, err := range l.broker.Log(ctx, name.operation, name.stream, begin, true) {
		switch {
		case err != nil:
			return err
		case part.Done != nil:
			return l.rest(ctx, part.Done, name.stream, begin, part.Offset, sink)
		}
		if _, err := sink.Write(part.Data); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: %s", errInterrupted, name.operation)
}

// rest writes what a done operation's output has from offset on. begin is what the client asked for.
func (l *logs) rest(ctx context.Context, op *broker.Operation, stream broker.LogStream, begin, offset int64, sink io.Writer) error {
	response, err := l.answers.response(ctx, op)
	if err != nil {
		return err
	}
	d, err := op.Output(stream, response)
	switch {
	case err != nil:
		return err
	case d.IsZero() && op.Attempt == 0, !d.IsZero() && offset == d.Size():
		return nil
	case d.IsZero():
		return fmt.Errorf("%w: %s of operation %s is not kept from byte %d on", errNotFound, stream, op.Name, offset)
	case begin > d.Size():
		return fmt.Errorf("%w: read_offset %d of an output of %d bytes", errRange, begin, d.Size())
	case offset > d.Size():
		return nil // an attempt that failed had written more
	}
	r, err := l.blobs.Open(ctx, d, offset)
	if err != nil {
		return onRead(err)
	}
	_, err = io.Copy(sink, r)
	r.Close() //nolint:errcheck // the output has been sent, or the call has failed already
	return onRead(err)
}
