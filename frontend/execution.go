package frontend

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/time/rate"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// execution serves Execution. An Execute stream is a watch of an operation that any frontend can take
// up again: nothing about it is kept here.
type execution struct {
	repb.UnimplementedExecutionServer
	broker   *broker.Client
	actions  actioncache.Results
	blobs    cas.Store
	answers  *answers
	waiters  *waiters
	limits   Limits
	metrics  *metrics
	enabled  bool
	executed func(action digest.Digest)
	rate     *rate.Limiter
}

// operationStream is an Execute or WaitExecution stream.
type operationStream = grpc.ServerStreamingServer[longrunningpb.Operation]

// Execute answers from the action cache or queues the action and follows its operation to the end.
// What is wrong with the request itself is a gRPC status; what is wrong with the blobs it names is the
// status in the response of a done operation (rows EXA-2, D6, D7).
func (e *execution) Execute(req *repb.ExecuteRequest, stream operationStream) error {
	ctx, leave, err := e.waiters.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	action, err := e.admit(req)
	if err != nil {
		return err
	}
	want := wants{stdout: req.GetInlineStdout(), stderr: req.GetInlineStderr(), files: inlineFiles(req.GetInlineOutputFiles(), e.limits.MaxInlineFiles)}
	states, err := e.submit(ctx, req, action)
	if err == nil {
		err = e.follow(ctx, stream, states, want)
	}
	if err != nil {
		err = e.conclude(ctx, stream, action, want, err)
	}
	return endOf(ctx, err)
}

// submit returns the states of the operation that is to answer a request. What it takes to get there is not in the
// stack of a stream that waits: 16 KiB of stack become 8 when the garbage collector finds less than 3 KiB in use.
func (e *execution) submit(ctx context.Context, req *repb.ExecuteRequest, action digest.Digest) (iter.Seq2[*broker.Operation, error], error) {
	request, err := e.prepare(ctx, req, action)
	if err != nil {
		return nil, err
	}
	return e.broker.Execute(ctx, request), nil
}

// conclude answers what has ended otherwise than with the end of an operation.
func (e *execution) conclude(ctx context.Context, stream operationStream, action digest.Digest, want wants, err error) error {
	var found *cached
	var refused *refusal
	switch {
	case errors.As(err, &found):
		err = e.finish(ctx, stream, "cached-", action, want, &repb.ExecuteResponse{
			Result: found.result, CachedResult: true, Status: &statuspb.Status{},
		})
	case errors.Is(err, broker.ErrNoWorker), errors.Is(err, broker.ErrInvalid):
		refused = &refusal{cause: err}
		fallthrough
	case errors.As(err, &refused):
		err = e.finish(ctx, stream, "refused-", action, want, &repb.ExecuteResponse{
			Status: statusOf(refused.cause, maxViolations).Proto(),
		})
	case errors.Is(err, errNotFound), errors.Is(err, broker.ErrNotFound):
		// The operation was deleted or its response is gone. NOT_FOUND is final for Execute; told to
		// come again, a client waits for the operation, finds it gone and executes anew.
		err = fmt.Errorf("%w: %w", errInterrupted, err)
	}
	return err
}

// cached is the error that carries a result of the action cache out of the way to the queue.
type cached struct{ result *repb.ActionResult }

func (c *cached) Error() string { return "the action cache has a result" }

// refusal reports an action that can't be executed as it is, which is an answer and not a failure
// of the call.
type refusal struct{ cause error }

func (r *refusal) Error() string { return r.cause.Error() }
func (r *refusal) Unwrap() error { return r.cause }

// admit checks all of a request that needs no blob.
func (e *execution) admit(req *repb.ExecuteRequest) (digest.Digest, error) {
	if !e.enabled {
		return digest.Digest{}, fmt.Errorf("%w: remote execution is turned off on this farm", errDisabled)
	}
	action, err := parseAction(req.GetInstanceName(), req.GetDigestFunction(), req.GetActionDigest())
	if err != nil {
		return digest.Digest{}, err
	}
	if !e.rate.Allow() {
		return digest.Digest{}, fmt.Errorf("%w: this frontend takes %d; try again in a moment", errRate, e.limits.ExecuteRate)
	}
	return action, errors.Join(
		checkPriority("execution_policy.priority", req.GetExecutionPolicy().GetPriority()),
		checkPriority("results_cache_policy.priority", req.GetResultsCachePolicy().GetPriority()),
	)
}

// prepare returns what to ask of the broker. The error, which the broker's Execute may also give, is
// *cached when the action cache has a result that the request accepts, and *refusal when the action
// cannot run.
func (e *execution) prepare(ctx context.Context, req *repb.ExecuteRequest, action digest.Digest) (broker.Request, error) {
	look := func(ctx context.Context) error {
		result, err := lookup(ctx, e.actions, action, e.metrics)
		if errors.Is(err, actioncache.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return &cached{result: result}
	}
	request := broker.Request{
		Action:          action,
		Priority:        req.GetExecutionPolicy().GetPriority(),
		SkipCacheLookup: req.GetSkipCacheLookup(),
		Metadata:        requestMetadata(ctx),
	}
	if !request.SkipCacheLookup {
		// A hit needs the digest alone: the action itself may be gone by now (row EXV-30).
		if err := look(ctx); err != nil {
			return request, err
		}
	}
	message, platform, err := e.inspect(ctx, action)
	if err != nil {
		return request, err
	}
	request.Platform, request.DoNotCache = platform, message.GetDoNotCache()
	if request.ActionData, err = proto.Marshal(message); err != nil {
		return request, fmt.Errorf("encode action %v: %w", action, err)
	}
	if !request.SkipCacheLookup && !request.DoNotCache {
		request.Confirm = look
	}
	return request, nil
}

// inspect reads what the queue needs to know of an action. Its errors are refusals, except for those
// of a CAS that does not answer.
func (e *execution) inspect(ctx context.Context, action digest.Digest) (*repb.Action, broker.Platform, error) {
	message, err := e.readAction(ctx, action)
	if err != nil {
		return nil, nil, refuse(err)
	}
	asked := message.GetPlatform()
	if asked == nil {
		d, err := action.Space().Parse(message.GetCommandDigest())
		if err != nil {
			return nil, nil, refuse(err)
		}
		command := new(repb.Command)
		if err := readMessage(ctx, e.blobs, d, e.limits.MaxCommandBytes, command); err != nil {
			return nil, nil, refuse(err)
		}
		asked = command.GetPlatform() //nolint:staticcheck // what clients of REAPI 2.0 and 2.1 send
	}
	platform, err := broker.PlatformOf(asked)
	if err != nil {
		return nil, nil, refuse(err)
	}
	return message, platform, nil
}

// readAction returns a checked action whose command and input root are in the CAS.
func (e *execution) readAction(ctx context.Context, action digest.Digest) (*repb.Action, error) {
	message := new(repb.Action)
	if err := readMessage(ctx, e.blobs, action, e.limits.MaxActionBytes, message); err != nil {
		return nil, err
	}
	command, err := action.Space().Parse(message.GetCommandDigest())
	if err != nil {
		return nil, fmt.Errorf("command_digest of action %v: %w", action, err)
	}
	root, err := action.Space().Parse(message.GetInputRootDigest())
	if err != nil {
		return nil, fmt.Errorf("input_root_digest of action %v: %w", action, err)
	}
	if timeout := message.GetTimeout(); timeout != nil {
		if timeout.CheckValid() != nil || timeout.AsDuration() < 0 {
			return nil, fmt.Errorf("%w: timeout %s of action %v", errInvalid, durationText(timeout), action)
		}
		if timeout.AsDuration() > e.limits.MaxActionTimeout {
			return nil, fmt.Errorf("%w: timeout %s of action %v is above the farm's maximum of %v",
				errInvalid, durationText(timeout), action, e.limits.MaxActionTimeout)
		}
	}
	missing, err := cas.Confirm(ctx, e.blobs, []digest.Digest{command, root})
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, &missingError{missing: missing}
	}
	return message, nil
}

// refuse makes an error a refusal when it is about the action.
func refuse(err error) error {
	if missingOf(err) != nil || errors.Is(err, errInvalid) || errors.Is(err, digest.ErrInvalid) || errors.Is(err, broker.ErrInvalid) {
		return &refusal{cause: err}
	}
	return err
}

// finish sends the only message of a stream that has no operation of the broker. Its name is unguessable
// like theirs, and unknown to WaitExecution, after which clients execute again.
func (e *execution) finish(ctx context.Context, stream operationStream, prefix string, action digest.Digest, want wants, response *repb.ExecuteResponse) error {
	if err := e.answers.inline.apply(ctx, action.Space(), response.GetResult(), want); err != nil {
		return err
	}
	op, err := e.answers.finished(prefix+rand.Text(), action, response)
	if err != nil {
		return err
	}
	return stream.Send(op)
}

// follow sends the states of an operation, the present one at once, until it is done.
func (e *execution) follow(ctx context.Context, stream operationStream, states iter.Seq2[*broker.Operation, error], want wants) error {
	name := ""
	for op, err := range states {
		if err != nil {
			return err
		}
		name = op.Name
		answer, err := e.answers.of(ctx, op, want)
		if err != nil {
			return err
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
		if op.Done() {
			if e.executed != nil {
				e.executed(op.Action)
			}
			return nil
		}
	}
	return fmt.Errorf("%w: %s", errInterrupted, name)
}

// WaitExecution follows an operation that some frontend has started. A name that no operation has is
// NOT_FOUND, however it looks: only that makes clients execute again (row WAIT-3).
func (e *execution) WaitExecution(req *repb.WaitExecutionRequest, stream operationStream) error {
	ctx, leave, err := e.waiters.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	return endOf(ctx, e.follow(ctx, stream, e.broker.Watch(ctx, req.GetName()), wants{}))
}

// metadataHeader carries the client's RequestMetadata.
const metadataHeader = "build.bazel.remote.execution.v2.requestmetadata-bin"

// requestMetadata returns what the client says of itself, or nil (row GEN-24).
func requestMetadata(ctx context.Context) *repb.RequestMetadata {
	for _, value := range metadata.ValueFromIncomingContext(ctx, metadataHeader) {
		m := new(repb.RequestMetadata)
		if proto.Unmarshal([]byte(value), m) == nil {
			return m
		}
	}
	return nil
}
