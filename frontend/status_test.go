package frontend_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// Audit row P22: every sentinel that can reach a client has its code, alone and wrapped.
func TestErrorMapping(t *testing.T) {
	rows := []struct {
		err   error
		code  codes.Code
		retry bool
	}{
		{frontend.ErrInvalid, codes.InvalidArgument, false},
		{frontend.ErrRange, codes.OutOfRange, false},
		{frontend.ErrDenied, codes.PermissionDenied, false},
		{frontend.ErrDisabled, codes.FailedPrecondition, false},
		{frontend.ErrOversized, codes.FailedPrecondition, false},
		{frontend.ErrTooLarge, codes.ResourceExhausted, false},
		{frontend.ErrUnimplemented, codes.Unimplemented, false},
		{frontend.ErrNotFound, codes.NotFound, false},
		{frontend.ErrDamaged, codes.DataLoss, false},
		{frontend.ErrBusy, codes.ResourceExhausted, true},
		{frontend.ErrRate, codes.ResourceExhausted, true},
		{frontend.ErrMoved, codes.Aborted, true},
		{frontend.ErrDraining, codes.Unavailable, true},
		{frontend.ErrInterrupted, codes.Unavailable, true},
		{frontend.ErrStalled, codes.DeadlineExceeded, false},
		{frontend.ErrSlow, codes.DeadlineExceeded, false},
		{digest.ErrInvalid, codes.InvalidArgument, false},
		{cas.ErrNotFound, codes.NotFound, false},
		{cas.ErrMismatch, codes.InvalidArgument, false},
		{compress.ErrInvalid, codes.InvalidArgument, false},
		{compress.ErrTooLarge, codes.InvalidArgument, false},
		{cas.ErrFull, codes.ResourceExhausted, false},
		{cas.ErrNotKept, codes.InvalidArgument, false},
		{cas.ErrUnavailable, codes.Unavailable, true},
		{actioncache.ErrNotFound, codes.NotFound, false},
		{actioncache.ErrInvalid, codes.InvalidArgument, false},
		{actioncache.ErrTooLarge, codes.InvalidArgument, false},
		{broker.ErrInvalid, codes.InvalidArgument, false},
		{broker.ErrNotFound, codes.NotFound, false},
		{frontend.ErrDownloads, codes.ResourceExhausted, true},
		{broker.ErrQueueFull, codes.ResourceExhausted, true},
		{broker.ErrTooManyPools, codes.ResourceExhausted, true},
		{broker.ErrTooManyCancels, codes.ResourceExhausted, false},
		{broker.ErrUnavailable, codes.Unavailable, true},
		{broker.ErrNoWorker, codes.FailedPrecondition, false},
		{broker.ErrLost, codes.Unavailable, true},
		{broker.ErrCancelled, codes.Canceled, false},
		{context.Canceled, codes.Canceled, false},
		{context.DeadlineExceeded, codes.DeadlineExceeded, false},
	}
	covered := map[error]bool{}
	for _, row := range rows {
		covered[row.err] = true
		for _, err := range []error{row.err, fmt.Errorf("blob 7: %w", row.err), fmt.Errorf("a: %w", errors.Join(errors.New("b"), row.err))} {
			got := frontend.StatusOf(err, 10)
			if got.Code() != row.code {
				t.Errorf("%v: code %v, want %v", err, got.Code(), row.code)
			}
			if retry := len(got.Details()) == 1; retry != row.retry {
				t.Errorf("%v: details %v, want a RetryInfo: %v", err, got.Details(), row.retry) // row GEN-1
			}
		}
	}
	for _, known := range frontend.SentinelCodes {
		if !covered[known.Sentinel()] {
			t.Errorf("no test for the sentinel %v", known.Sentinel())
		}
	}

	for what, test := range map[string]struct {
		err  error
		code codes.Code
		text string
	}{
		"no error":               {nil, codes.OK, ""},
		"unknown":                {errors.New("password=hunter2"), codes.Internal, "internal error"},
		"panic":                  {frontend.ErrPanic, codes.Internal, "internal error"},
		"the library's":          {status.Error(codes.ResourceExhausted, "message too large"), codes.ResourceExhausted, "message too large"},
		"damage is not a lie":    {fmt.Errorf("%w: %w", frontend.ErrDamaged, cas.ErrMismatch), codes.DataLoss, ""},
		"incomplete result":      {fmt.Errorf("%w: %w", actioncache.ErrNotFound, &actioncache.MissingError{Missing: []digest.Digest{absent()}}), codes.NotFound, ""},
		"a slow store, not call": {fmt.Errorf("%w: %w", cas.ErrUnavailable, context.DeadlineExceeded), codes.Unavailable, ""},
	} {
		got := frontend.StatusOf(test.err, 10)
		if got.Code() != test.code || !strings.Contains(got.Message(), test.text) || strings.Contains(got.Message(), "hunter2") {
			t.Errorf("%s: %v, want %v %q", what, got, test.code, test.text)
		}
	}
}

// Rows EXA-8 to EXA-10: one detail, all violations MISSING, no instance in the subject, bounded.
func TestEXA_9_MissingBlobs(t *testing.T) {
	inInstance := must(digest.SpaceOf("a/b", space.Function().Proto(), ""))
	var ds []digest.Digest
	for i := range 50 {
		ds = append(ds, inInstance.Of(fmt.Appendf(nil, "%d", i)))
	}
	err := fmt.Errorf("store the result: %w", &actioncache.MissingError{Missing: ds})
	for most, want := range map[int]int{7: 7, frontend.MaxTrailerViolations: 40, frontend.MaxViolations: 50} {
		got := frontend.StatusOf(err, most)
		if got.Code() != codes.FailedPrecondition || len(got.Details()) != 1 {
			t.Fatalf("%v with %d details, want FAILED_PRECONDITION with one", got.Code(), len(got.Details()))
		}
		failure, ok := got.Details()[0].(*errdetails.PreconditionFailure)
		if !ok || len(failure.GetViolations()) != want {
			t.Fatalf("detail %v, want %d violations", got.Details()[0], want)
		}
		for i, v := range failure.GetViolations() {
			if subject := fmt.Sprintf("blobs/%s/%d", ds[i].Hash(), ds[i].Size()); v.GetType() != "MISSING" || v.GetSubject() != subject {
				t.Errorf("violation %v, want MISSING %s", v, subject)
			}
		}
	}
	// Row GEN-30: in trailers the details are base64.
	if n := proto.Size(frontend.StatusOf(err, frontend.MaxTrailerViolations).Proto()) * 4 / 3; n > 8<<10-1<<10 {
		t.Errorf("%d bytes in trailers, clients take 8 KiB", n)
	}
}

func TestTextsAreBoundedUTF8(t *testing.T) {
	for _, text := range []string{strings.Repeat("\xff", 100), strings.Repeat("ä", 1<<20), "x" + strings.Repeat("ä", 1<<10)} {
		got := frontend.StatusOf(fmt.Errorf("%w: %s", frontend.ErrInvalid, text), 0).Message()
		if !utf8.ValidString(got) || len(got) > frontend.MaxStatusText+16 {
			t.Errorf("%d bytes, valid UTF-8: %v", len(got), utf8.ValidString(got))
		}
	}
}

func TestTheEndOfTheContextGoesFirst(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	if err := frontend.EndOf(ctx, cas.ErrFull); !errors.Is(err, cas.ErrFull) {
		t.Errorf("EndOf = %v while the context lives", err)
	}
	cancel(frontend.ErrStalled)
	if err := frontend.EndOf(ctx, cas.ErrFull); !errors.Is(err, frontend.ErrStalled) {
		t.Errorf("EndOf = %v, want the cause", err)
	}
	if err := frontend.EndOf(ctx, nil); err != nil {
		t.Errorf("EndOf(nil) = %v", err)
	}
}
