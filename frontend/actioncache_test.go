package frontend_test

import (
	"bytes"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

func allowUpdates(c *frontend.Config) { c.AllowActionCacheUpdates = true }

// action stores an action like no other, with its command, and returns its digest.
func (h *harness) action(t testing.TB, changes ...func(*repb.Action, *repb.Command)) digest.Digest {
	t.Helper()
	command := &repb.Command{Arguments: []string{"/bin/true"}}
	action := &repb.Action{Salt: random(16), InputRootDigest: emptyDigest.Proto()}
	for _, change := range changes {
		change(action, command)
	}
	if action.GetCommandDigest() == nil {
		action.CommandDigest = h.putMessage(t, command).Proto()
	}
	return h.putMessage(t, action)
}

// result is a result whose blobs are present.
func (h *harness) result(t testing.TB) *repb.ActionResult {
	t.Helper()
	return &repb.ActionResult{
		OutputFiles: []*repb.OutputFile{
			{Path: "a/b.d", Digest: h.put(t, []byte("deps of b")).Proto()},
			{Path: "a/b.o", Digest: h.put(t, []byte("object b")).Proto(), IsExecutable: true},
		},
		StdoutDigest:      h.put(t, []byte("out")).Proto(),
		StderrDigest:      h.put(t, []byte("err")).Proto(),
		ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"},
	}
}

func (h *harness) cache(t testing.TB, action digest.Digest, result *repb.ActionResult) {
	t.Helper()
	if err := h.actions.Put(t.Context(), action, result); err != nil {
		t.Fatalf("Put: %v", err)
	}
}

func diffMessages(want, got proto.Message) string { return cmp.Diff(want, got, protocmp.Transform()) }

func TestGetActionResult(t *testing.T) {
	h := start(t)
	action, result := h.action(t), h.result(t)
	_, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
	wantCode(t, "ACG-1 no entry", err, codes.NotFound)
	h.cache(t, action, result)
	for row, test := range map[string]struct {
		req  *repb.GetActionResultRequest
		want func(*repb.ActionResult)
	}{
		"ACG-5 nothing asked": {&repb.GetActionResultRequest{}, func(*repb.ActionResult) {}},
		"ACG-6 stdout":        {&repb.GetActionResultRequest{InlineStdout: true}, func(r *repb.ActionResult) { r.StdoutRaw = []byte("out") }},
		"ACG-6 stderr":        {&repb.GetActionResultRequest{InlineStderr: true}, func(r *repb.ActionResult) { r.StderrRaw = []byte("err") }},
		"ACG-8 files": {&repb.GetActionResultRequest{InlineOutputFiles: []string{"nope", "a/b.d"}}, func(r *repb.ActionResult) {
			r.OutputFiles[0].Contents = []byte("deps of b")
		}},
	} {
		t.Run(row, func(t *testing.T) {
			test.req.ActionDigest = action.Proto()
			got, err := h.ac.GetActionResult(t.Context(), test.req)
			if err != nil {
				t.Fatalf("GetActionResult: %v", err)
			}
			want := proto.CloneOf(result)
			test.want(want)
			if diff := diffMessages(want, got); diff != "" {
				t.Errorf("GetActionResult (-want +got):\n%s", diff)
			}
		})
	}
	for row, bad := range badDigests() {
		_, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: bad})
		wantCode(t, "ACG-11 "+row, err, codes.InvalidArgument)
	}
	_, err = h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: "other", ActionDigest: action.Proto()})
	wantCode(t, "ACG-10 another instance", err, codes.NotFound)
}

// Rows ACG-7 and X-154: what is large stays a digest.
func TestACG_7_X_154_GEN_27_InlineIsBounded(t *testing.T) {
	h := start(t)
	action, result := h.action(t), h.result(t)
	result.StdoutDigest = h.put(t, random(8<<20)).Proto()
	result.OutputFiles[1].Digest = h.put(t, random(900<<10)).Proto()
	result.StderrDigest = h.put(t, random(200<<10)).Proto()
	h.cache(t, action, result)
	got, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{
		ActionDigest: action.Proto(), InlineStdout: true, InlineStderr: true, InlineOutputFiles: []string{"a/b.d", "a/b.o"},
	})
	if err != nil {
		t.Fatalf("GetActionResult: %v", err)
	}
	if n := len(got.GetStdoutRaw()); n != 0 {
		t.Errorf("%d bytes of stdout, want the digest only", n)
	}
	if n := len(got.GetStderrRaw()); n != 200<<10 {
		t.Errorf("%d bytes of stderr, want all", n)
	}
	if n := len(got.GetOutputFiles()[1].GetContents()); n != 0 {
		t.Errorf("%d bytes of a/b.o, want the digest only, since the rest is taken", n)
	}
	if proto.Size(got) > 2<<20 {
		t.Errorf("the answer has %d bytes", proto.Size(got))
	}
}

func TestACU_1_ACU_12_X_148_X_152_UpdatesAreOffByDefault(t *testing.T) {
	h := start(t)
	action := h.action(t)
	_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: h.result(t)})
	wantCode(t, "UpdateActionResult", err, codes.PermissionDenied)
	_, err = h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
	wantCode(t, "GetActionResult", err, codes.NotFound)
}

func TestACU_6_ACU_9_ACU_10_ACU_11_UpdateAndGet(t *testing.T) {
	h := start(t, allowUpdates)
	action := h.action(t)
	for i := range 2 {
		result := h.result(t)
		result.ExitCode = int32(i)
		result.StdoutDigest, result.StdoutRaw = nil, []byte("raw") // row ACU-6
		want := proto.CloneOf(result)
		raw := space.Of(result.GetStdoutRaw())
		want.StdoutDigest, want.StdoutRaw = raw.Proto(), nil
		got, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: result})
		if err != nil {
			t.Fatalf("UpdateActionResult: %v", err)
		}
		if diff := diffMessages(want, got); diff != "" {
			t.Errorf("UpdateActionResult (-want +got):\n%s", diff)
		}
		got, err = h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
		if err != nil {
			t.Fatalf("GetActionResult: %v", err)
		}
		if diff := diffMessages(want, got); diff != "" {
			t.Errorf("GetActionResult (-want +got):\n%s", diff)
		}
		if b, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: raw.String()}); err != nil || !bytes.Equal(b, []byte("raw")) {
			t.Errorf("Read of stdout = %q, %v", b, err)
		}
	}
}

// Decision D16: an output beside the working directory is inside the input root.
func TestACU_2_OutputsBesideTheWorkingDirectory(t *testing.T) {
	h := start(t, allowUpdates)
	result := h.result(t)
	result.OutputFiles[0].Path = "../x"
	action := h.action(t, func(_ *repb.Action, c *repb.Command) { c.WorkingDirectory = "a" })
	_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: result})
	wantCode(t, "from a/", err, codes.OK)
	_, err = h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: h.action(t).Proto(), ActionResult: result})
	wantCode(t, "from the root", err, codes.InvalidArgument, "../x")
}

// moon keeps results under the digest of a JSON text.
func TestUpdateActionResultOfAnotherDescription(t *testing.T) {
	h := start(t, allowUpdates)
	action, result := h.put(t, []byte(`{"task": "app:build"}`)), h.result(t)
	_, err := h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: result})
	wantCode(t, "UpdateActionResult", err, codes.OK)
	_, err = h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action.Proto()})
	wantCode(t, "GetActionResult", err, codes.OK)
	result.OutputFiles[0].Path = "../x"
	_, err = h.ac.UpdateActionResult(t.Context(), &repb.UpdateActionResultRequest{ActionDigest: action.Proto(), ActionResult: result})
	wantCode(t, "outside of the root", err, codes.InvalidArgument, "../x")
}

func TestUpdateActionResultRefuses(t *testing.T) {
	h := start(t, allowUpdates)
	const bad = codes.InvalidArgument
	file := func(path string) func(*repb.UpdateActionResultRequest) {
		return func(r *repb.UpdateActionResultRequest) { r.ActionResult.OutputFiles[0].Path = path }
	}
	m := absent()
	for row, test := range map[string]struct {
		change func(*repb.UpdateActionResultRequest)
		code   codes.Code
	}{
		"ACU-2 no result":           {func(r *repb.UpdateActionResultRequest) { r.ActionResult = nil }, bad},
		"ACU-2 action digest":       {func(r *repb.UpdateActionResultRequest) { r.ActionDigest = &repb.Digest{Hash: "x"} }, bad},
		"ACU-2 X-149 absolute path": {file("/etc/passwd"), bad},
		"ACU-2 X-149 escaping path": {file("../../x"), bad},
		"ACU-2 empty path":          {file(""), bad},
		"ACU-2 X-149 duplicate":     {file("a/b.o"), bad},
		"ACU-2 nil digest":          {func(r *repb.UpdateActionResultRequest) { r.ActionResult.OutputFiles[0].Digest = nil }, bad},
		"ACU-2 X-149 bad digest":    {func(r *repb.UpdateActionResultRequest) { r.ActionResult.OutputFiles[0].Digest.Hash = "ab" }, bad},
		"ACU-2 bad stdout":          {func(r *repb.UpdateActionResultRequest) { r.ActionResult.StdoutDigest.SizeBytes = -1 }, bad},
		"ACU-2 no target": {func(r *repb.UpdateActionResultRequest) {
			r.ActionResult.OutputSymlinks = []*repb.OutputSymlink{{Path: "l"}}
		}, bad},
		"ACU-7 priority": {func(r *repb.UpdateActionResultRequest) {
			r.ResultsCachePolicy = &repb.ResultsCachePolicy{Priority: 99999}
		}, bad},
		"ACU-8 raw differs": {func(r *repb.UpdateActionResultRequest) { r.ActionResult.StdoutRaw = []byte("other") }, bad},
		"X-150 too large": {func(r *repb.UpdateActionResultRequest) {
			r.ActionResult.StdoutDigest, r.ActionResult.StdoutRaw = nil, random(4<<20)
		}, bad},
		"ACU-3 absent action": {func(r *repb.UpdateActionResultRequest) { r.ActionDigest = m.Proto() }, codes.FailedPrecondition},
		"ACU-3 absent command": {func(r *repb.UpdateActionResultRequest) {
			r.ActionDigest = h.action(t, func(a *repb.Action, _ *repb.Command) { a.CommandDigest = m.Proto() }).Proto()
		}, codes.FailedPrecondition},
		"ACU-4 X-149 absent output": {func(r *repb.UpdateActionResultRequest) { r.ActionResult.OutputFiles[0].Digest = m.Proto() }, codes.FailedPrecondition},
	} {
		t.Run(row, func(t *testing.T) {
			req := &repb.UpdateActionResultRequest{ActionDigest: h.action(t).Proto(), ActionResult: h.result(t)}
			test.change(req)
			_, err := h.ac.UpdateActionResult(t.Context(), req)
			wantCode(t, "UpdateActionResult", err, test.code)
			if test.code == codes.FailedPrecondition {
				wantMissing(t, status.Convert(err), m)
			}
			if _, err := h.ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: req.GetActionDigest()}); err == nil {
				t.Error("a refused result was stored")
			}
		})
	}
}

// wantMissing checks that a status has one detail, which reports exactly these blobs.
func wantMissing(t testing.TB, s *status.Status, ds ...digest.Digest) {
	t.Helper()
	if s.Code() != codes.FailedPrecondition || len(s.Details()) != 1 {
		t.Fatalf("status %v, want FAILED_PRECONDITION with one detail", s)
	}
	failure, ok := s.Details()[0].(*errdetails.PreconditionFailure)
	if !ok {
		t.Fatalf("detail %T, want a PreconditionFailure", s.Details()[0])
	}
	var want, got []string
	for _, d := range ds {
		want = append(want, "MISSING "+d.Blob())
	}
	for _, v := range failure.GetViolations() {
		got = append(got, v.GetType()+" "+v.GetSubject())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("violations (-want +got):\n%s", strings.TrimSpace(diff))
	}
}
