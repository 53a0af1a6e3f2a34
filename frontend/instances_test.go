package frontend_test

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	remoteasset "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend"
)

// callsOf is every call that names an instance, made for one.
func (h *harness) callsOf(instance string) map[string]func(ctx context.Context) error {
	d := must(digest.SpaceOf(instance, repb.DigestFunction_SHA256, "")).Of([]byte("x"))
	return map[string]func(ctx context.Context) error{
		"GetCapabilities": func(ctx context.Context) error {
			_, err := h.caps.GetCapabilities(ctx, &repb.GetCapabilitiesRequest{InstanceName: instance})
			return err
		},
		"FindMissingBlobs": func(ctx context.Context) error {
			_, err := h.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: instance, BlobDigests: protos(d)})
			return err
		},
		"BatchUpdateBlobs": func(ctx context.Context) error {
			_, err := h.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: instance})
			return err
		},
		"BatchReadBlobs": func(ctx context.Context) error {
			_, err := h.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{InstanceName: instance, Digests: protos(d)})
			return err
		},
		"GetTree": func(ctx context.Context) error {
			stream, err := h.cas.GetTree(ctx, &repb.GetTreeRequest{InstanceName: instance, RootDigest: d.Proto()})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"GetActionResult": func(ctx context.Context) error {
			_, err := h.ac.GetActionResult(ctx, &repb.GetActionResultRequest{InstanceName: instance, ActionDigest: d.Proto()})
			return err
		},
		"UpdateActionResult": func(ctx context.Context) error {
			_, err := h.ac.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{InstanceName: instance, ActionDigest: d.Proto(), ActionResult: &repb.ActionResult{}})
			return err
		},
		"Execute": func(ctx context.Context) error {
			stream, err := h.exec.Execute(ctx, &repb.ExecuteRequest{InstanceName: instance, ActionDigest: d.Proto()})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"Read": func(ctx context.Context) error {
			_, err := h.read(ctx, &bytestream.ReadRequest{ResourceName: d.String()})
			return err
		},
		"Write": func(ctx context.Context) error {
			_, err := h.write(ctx, chunks(uploadName(d), []byte("x"), 1)...)
			return err
		},
		"QueryWriteStatus": func(ctx context.Context) error {
			_, err := h.bytes.QueryWriteStatus(ctx, &bytestream.QueryWriteStatusRequest{ResourceName: uploadName(d)})
			return err
		},
	}
}

func TestInstancesThatAreServed(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Instances = frontend.Instances{"a/b/c", "main"} })
	for _, instance := range []string{"", "nope", "a/b", "main/x"} {
		for call, do := range h.callsOf(instance) {
			t.Run("GEN-2 CAP-3 X-12 "+call+" of "+name(instance), func(t *testing.T) {
				wantCode(t, call, do(t.Context()), codes.InvalidArgument, "instance name \""+instance+"\"")
			})
		}
	}
	for call, do := range h.callsOf("a/b/c") {
		t.Run("GEN-3 "+call+" of a served instance with slashes", func(t *testing.T) {
			if err := do(t.Context()); err != nil && strings.Contains(err.Error(), "is not served") {
				t.Errorf("%s: %v, want it served", call, err)
			}
		})
	}
	if _, err := h.ops.ListOperations(t.Context(), &longrunningpb.ListOperationsRequest{}); err != nil {
		t.Errorf("ListOperations, which names no instance: %v", err)
	}
}

// The HTTP cache and the Remote Asset API serve the same instances as all else.
func TestInstancesOfOtherProtocols(t *testing.T) {
	r := startAssets(t, func(c *frontend.Config) { c.Instances = frontend.Instances{"main"}; c.AllowActionCacheUpdates = true })
	content := []byte("content")
	r.origin.set("/x", content)
	uris := []string{r.origin.URL + "/x"}
	d := space.Of(content).Proto()
	calls := func(instance string) map[string]func() error {
		return map[string]func() error{
			"FetchBlob": func() error {
				_, err := r.fetch.FetchBlob(t.Context(), &remoteasset.FetchBlobRequest{InstanceName: instance, Uris: uris})
				return err
			},
			"FetchDirectory": func() error {
				_, err := r.fetch.FetchDirectory(t.Context(), &remoteasset.FetchDirectoryRequest{InstanceName: instance, Uris: uris})
				return err
			},
			"PushBlob": func() error {
				_, err := r.push.PushBlob(t.Context(), &remoteasset.PushBlobRequest{InstanceName: instance, Uris: uris, BlobDigest: d})
				return err
			},
			"PushDirectory": func() error {
				_, err := r.push.PushDirectory(t.Context(), &remoteasset.PushDirectoryRequest{InstanceName: instance, Uris: uris, RootDirectoryDigest: d})
				return err
			},
		}
	}
	for _, instance := range []string{"", "other"} {
		for call, do := range calls(instance) {
			t.Run("GEN-2 "+call+" of "+name(instance), func(t *testing.T) {
				before := r.origin.requests.Load()
				wantCode(t, call, do(), codes.InvalidArgument, "instance name \""+instance+"\"")
				if r.origin.requests.Load() != before {
					t.Error("the origin was asked")
				}
			})
		}
	}
	for call, do := range calls("main") {
		if err := do(); err != nil && strings.Contains(err.Error(), "is not served") {
			t.Errorf("%s: %v, want it served", call, err)
		}
	}
	s := r.serveHTTP(t)
	for _, store := range []string{"cas", "ac"} {
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut} {
			t.Run("GEN-2 "+method+" "+store, func(t *testing.T) {
				path := "/" + store + "/" + d.GetHash()
				for _, instance := range []string{"", "/other"} {
					if a := ask(t, method, s.URL+instance+path, content); a.status != http.StatusBadRequest {
						t.Errorf("%s: status %d %q, want that of a wrong request", instance+path, a.status, a.body)
					}
				}
				if a := ask(t, method, s.URL+"/main"+path, content); strings.Contains(string(a.body), "is not served") {
					t.Errorf("/main%s: status %d %q", path, a.status, a.body)
				}
			})
		}
	}
}

// Names that no client made up are not remembered anywhere.
func TestManyUnknownInstances(t *testing.T) {
	h := start(t, func(c *frontend.Config) { c.Instances = frontend.Instances{"main"} })
	series := h.series(t)
	t.Run("X-14 a thousand of them", func(t *testing.T) {
		for i := range 1000 {
			_, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{InstanceName: strings.Repeat("x", i%200) + name(i)})
			wantCode(t, "FindMissingBlobs", err, codes.InvalidArgument)
		}
		// The first refusal makes the series of its method and code.
		if got := h.series(t); got > series+2 {
			t.Errorf("%d series of metrics, want at most two more than %d", got, series)
		}
	})
}

// series counts the series of all metrics.
func (h *harness) series(t testing.TB) int {
	t.Helper()
	families, err := h.metrics.Gather()
	if err != nil {
		t.Fatalf("Gather: %v", err)
	}
	n := 0
	for _, family := range families {
		n += len(family.GetMetric())
	}
	return n
}

func TestInstancesValidate(t *testing.T) {
	if err := (frontend.Instances{"", "a/b/c"}).Validate(); err != nil {
		t.Errorf("Validate: %v", err)
	}
	err := frontend.Instances{"x/blobs", "ok", "a//b"}.Validate()
	if err == nil || !strings.Contains(err.Error(), "x/blobs") || !strings.Contains(err.Error(), "a//b") {
		t.Errorf("Validate = %v, want both bad names", err)
	}
}
