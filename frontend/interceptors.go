package frontend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
)

// callGuard can end a call that waits for its client. gRPC makes a call's Recv and Send end with the
// context that the tap handle returned, and only with that one: a context derived in a handler
// ends neither.
type callGuard struct{ cancel context.CancelCauseFunc }

// callGuardKey is the context key of the call's *callGuard.
type callGuardKey struct{}

// tap gives every call a context that can be ended: a unary call after Limits.Unary, which also bounds
// how long its request may take to arrive, and a stream by its guardedStream. gRPC ends the context
// above at the end of every call, which frees both.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if s.unary[info.FullMethodName] {
		ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.Limits.Unary, errSlow)
		return context.WithValue(ctx, callGuardKey{}, &callGuard{cancel: func(error) { cancel() }}), nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	return stallContext{context.WithValue(ctx, callGuardKey{}, &callGuard{cancel: cancel})}, nil
}

// stallContext is the context of a stream. When the stream stalled, its Err is DeadlineExceeded: gRPC
// sends the status of Err itself when it ends a Recv or Send, before the handler has returned one.
type stallContext struct{ context.Context } //nolint:containedctx // it is a context

// Err implements context.Context.
func (c stallContext) Err() error {
	err := c.Context.Err()
	if err != nil && errors.Is(context.Cause(c.Context), errStalled) {
		return context.DeadlineExceeded
	}
	return err
}

// interceptUnary is around the handler of each unary call: metrics, log, the instance, and errors and panics to
// statuses.
func (s *Server) interceptUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	end := s.begin(info.FullMethod)
	defer func() { err = end(ctx, s.recovered(ctx, recover(), err)) }()
	if err := s.cfg.Instances.checkRequest(req); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// interceptStream is the same for streams, and bounds how long each message may take. It is one function, because
// its frame is part of the stack of every stream that waits.
func (s *Server) interceptStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	end := s.begin(info.FullMethod)
	defer func() { err = end(stream.Context(), s.recovered(stream.Context(), recover(), err)) }()
	guarded := &guardedStream{ServerStream: stream, bound: s.cfg.Limits.Stall, instances: s.cfg.Instances}
	if guard, ok := stream.Context().Value(callGuardKey{}).(*callGuard); ok {
		guarded.timer = time.AfterFunc(time.Hour, func() {
			s.metrics.stalls.Inc()
			guard.cancel(fmt.Errorf("%w: no message in %v", errStalled, guarded.bound))
		})
		guarded.timer.Stop()
		defer guarded.timer.Stop()
	}
	return handler(srv, guarded)
}

// guardedStream ends a stream whose client neither sends nor receives: the timer runs while RecvMsg or
// SendMsg does, and only then, so a stream that waits for the farm is not counted as stalled. Like the
// handlers of this package it is used by one goroutine.
type guardedStream struct {
	grpc.ServerStream
	bound     time.Duration
	timer     *time.Timer // nil without a guard
	instances Instances
	begun     bool // a message has come
}

// RecvMsg implements grpc.ServerStream. A message for an instance that is not served is an error.
func (g *guardedStream) RecvMsg(m any) error {
	if g.timer != nil {
		g.timer.Reset(g.bound)
		defer g.timer.Stop()
	}
	if err := g.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	first := !g.begun
	g.begun = true
	if _, ok := m.(*repb.RegisterChunkMappingRequest); ok && !first {
		return nil // Whatever it names is ignored (row CHK-13).
	}
	return g.instances.checkRequest(m)
}

// SendMsg implements grpc.ServerStream.
func (g *guardedStream) SendMsg(m any) error {
	if g.timer != nil {
		g.timer.Reset(g.bound)
		defer g.timer.Stop()
	}
	return g.ServerStream.SendMsg(m)
}

// begin counts a call; what it returns turns the handler's error into the call's status.
func (s *Server) begin(method string) (end func(ctx context.Context, err error) error) {
	start := time.Now()
	inFlight := s.metrics.inFlight.WithLabelValues(method)
	inFlight.Inc()
	return func(ctx context.Context, err error) error {
		inFlight.Dec()
		final := statusOf(endOf(ctx, err), maxTrailerViolations)
		s.metrics.duration.WithLabelValues(method, final.Code().String()).Observe(time.Since(start).Seconds())
		if err == nil {
			return nil
		}
		s.logFailure(ctx, method, final.Code(), err)
		return final.Err()
	}
}

// logFailure writes one line for a call that failed: an error when the farm is to blame.
func (s *Server) logFailure(ctx context.Context, method string, code codes.Code, err error) {
	level := slog.LevelDebug
	if code == codes.Internal || code == codes.Unknown || code == codes.DataLoss {
		level = slog.LevelError
	}
	if !s.cfg.Log.Enabled(ctx, level) {
		return
	}
	from := ""
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		from = p.Addr.String()
	}
	s.cfg.Log.Log(ctx, level, "call failed", "method", method, "code", code.String(), "peer", from,
		"invocation", clip(requestMetadata(ctx).GetToolInvocationId()), "err", err)
}

// recovered turns a panic into INTERNAL for its caller and a stack for the log (row GEN-32), and else returns what
// the handler has.
func (s *Server) recovered(ctx context.Context, p any, err error) error {
	if p == nil {
		return err
	}
	s.metrics.panics.Inc()
	s.cfg.Log.ErrorContext(ctx, "handler panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return errPanic
}
