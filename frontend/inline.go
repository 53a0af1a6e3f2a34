package frontend

import (
	"context"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// wants is what a client asked to have inlined.
type wants struct {
	stdout, stderr bool
	files          []string
}

// inlineFiles is the paths to inline, without those beyond the limit (row X-101).
func inlineFiles(paths []string, most int) []string {
	return paths[:min(len(paths), most)]
}

// inliner puts the bytes of small blobs into action results. It is best effort: what does not fit, or
// cannot be read now, stays a digest (rows ACG-5 to ACG-8).
type inliner struct {
	blobs  cas.Store
	limits Limits
}

// apply changes result, which the caller owns. Bytes that were not asked for are removed when there
// is a digest for them. The only error is that of ctx.
func (in *inliner) apply(ctx context.Context, space digest.Space, result *repb.ActionResult, want wants) error {
	if result == nil {
		return nil
	}
	if result.GetStdoutDigest() != nil {
		result.StdoutRaw = nil
	}
	if result.GetStderrDigest() != nil {
		result.StderrRaw = nil
	}
	for _, file := range result.GetOutputFiles() {
		file.Contents = nil
	}
	if !want.stdout && !want.stderr && len(want.files) == 0 {
		return nil
	}
	room := min(in.limits.MaxInlineBytes, in.limits.MaxResponseBytes/2-proto.Size(result))
	if want.stdout {
		in.read(ctx, space, result.GetStdoutDigest(), &result.StdoutRaw, &room)
	}
	if want.stderr {
		in.read(ctx, space, result.GetStderrDigest(), &result.StderrRaw, &room)
	}
	if len(want.files) > 0 {
		for _, file := range result.GetOutputFiles() {
			if slices.Contains(want.files, file.GetPath()) {
				in.read(ctx, space, file.GetDigest(), &file.Contents, &room)
			}
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (in *inliner) read(ctx context.Context, space digest.Space, message *repb.Digest, into *[]byte, room *int) {
	d, err := space.Parse(message)
	if err != nil || d.Size() == 0 || d.Size() > int64(*room) {
		return
	}
	if b, err := readBlob(ctx, in.blobs, d, int64(*room)); err == nil {
		*into = b
		*room -= len(b)
	}
}
