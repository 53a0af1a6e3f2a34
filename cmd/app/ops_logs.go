package app

import (
	"context"
	"errors"
	"fmt"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
)

// OpsLogs prints an output of an operation.
type OpsLogs struct {
	queueFlags `embed:""`
	Name       string `arg:"" help:"The operation's name."`
	Follow     bool   `short:"f" help:"Go on until the operation is done, also if it has not begun."`
	Stderr     bool   `help:"The standard error instead of the standard output."`
}

// maxResponse bounds the response of an operation that is read for the names of its outputs.
const maxResponse = 8 << 20

func (c *OpsLogs) run(ctx context.Context, p *process) error {
	stream := broker.Stdout
	if c.Stderr {
		stream = broker.Stderr
	}
	var last broker.LogPart
	err := c.withQueue(ctx, p, func(ctx context.Context, client *broker.Client) error {
		attempt := 0
		for part, err := range client.Log(ctx, c.Name, stream, 0, c.Follow) {
			if err != nil {
				return fmt.Errorf("operation %s: %w (finished ones are kept for an hour)", printable(c.Name), err)
			}
			if attempt != 0 && part.Attempt > attempt {
				p.log.WarnContext(ctx, "the operation runs again and its output goes on where that of the last attempt ended", "attempt", part.Attempt, "offset", part.Offset)
			}
			attempt = max(attempt, part.Attempt)
			if _, err := p.out.Write(part.Data); err != nil {
				return err
			}
			last = part
		}
		return nil
	})
	if err != nil || last.Done == nil {
		return err
	}
	return c.with(ctx, p, func(ctx context.Context, s *storage) error {
		return printRest(ctx, p.out, s.blobs, last.Done, stream, last.Offset)
	})
}

// printRest prints what the output of a done operation has from offset on.
func printRest(ctx context.Context, out io.Writer, blobs cas.Store, op *broker.Operation, stream broker.LogStream, offset int64) error {
	data := op.Response
	var err error
	if !op.ResponseBlob.IsZero() {
		if data, err = cas.ReadAll(ctx, blobs, op.ResponseBlob, maxResponse); err != nil {
			return fmt.Errorf("response of operation %s: %w", op.Name, err)
		}
	}
	response := new(repb.ExecuteResponse)
	if err := proto.Unmarshal(data, response); err != nil {
		return fmt.Errorf("response of operation %s: %w", op.Name, err)
	}
	d, err := op.Output(stream, response)
	switch {
	case err != nil:
		return err
	case d.IsZero() && op.Attempt == 0:
		return fmt.Errorf("operation %s has not run: %s", op.Name, outcomeOf(op))
	case d.IsZero():
		return fmt.Errorf("no %s of operation %s is kept: %s", stream, op.Name, outcomeOf(op))
	case offset >= d.Size():
		return nil
	}
	r, err := blobs.Open(ctx, d, offset)
	if err != nil {
		return fmt.Errorf("%s of operation %s: %w", stream, op.Name, err)
	}
	_, err = io.Copy(out, r)
	return errors.Join(err, r.Close())
}
