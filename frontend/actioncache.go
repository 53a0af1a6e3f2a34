package frontend

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// actionCache serves ActionCache.
type actionCache struct {
	repb.UnimplementedActionCacheServer
	actions actioncache.Results
	blobs   cas.Store
	inline  *inliner
	limits  Limits
	metrics *metrics
	updates bool
}

// GetActionResult returns a result whose blobs are all present, or NOT_FOUND.
func (a *actionCache) GetActionResult(ctx context.Context, req *repb.GetActionResultRequest) (*repb.ActionResult, error) {
	action, err := parseAction(req.GetInstanceName(), req.GetDigestFunction(), req.GetActionDigest())
	if err != nil {
		return nil, err
	}
	result, err := lookup(ctx, a.actions, action, a.metrics)
	if err != nil {
		return nil, err
	}
	want := wants{stdout: req.GetInlineStdout(), stderr: req.GetInlineStderr(), files: inlineFiles(req.GetInlineOutputFiles(), a.limits.MaxInlineFiles)}
	if err := a.inline.apply(ctx, action.Space(), result, want); err != nil {
		return nil, err
	}
	if n := proto.Size(result); n > a.limits.MaxResponseBytes {
		return nil, fmt.Errorf("%w: the result of action %v has %d bytes, at most %d are sent", errTooLarge, action, n, a.limits.MaxResponseBytes)
	}
	return result, nil
}

// lookup asks the action cache and counts the answer.
func lookup(ctx context.Context, actions actioncache.Results, action digest.Digest, metrics *metrics) (*repb.ActionResult, error) {
	result, err := actions.Get(ctx, action)
	switch {
	case err == nil:
		metrics.lookups.WithLabelValues("hit").Inc()
	case errors.Is(err, actioncache.ErrNotFound):
		metrics.lookups.WithLabelValues("miss").Inc()
	default:
		metrics.lookups.WithLabelValues("error").Inc()
	}
	return result, err
}

// parseAction returns the digest of a request's action.
func parseAction(instance string, fn repb.DigestFunction_Value, message *repb.Digest) (digest.Digest, error) {
	space, err := spaceOf(instance, fn, message)
	if err != nil {
		return digest.Digest{}, err
	}
	action, err := space.Parse(message)
	if err != nil {
		return digest.Digest{}, fmt.Errorf("action_digest: %w", err)
	}
	return action, nil
}

// UpdateActionResult stores a client's result when the action, its command and all that the result
// names are in the CAS. Raw bytes in it move there (row ACU-6).
func (a *actionCache) UpdateActionResult(ctx context.Context, req *repb.UpdateActionResultRequest) (*repb.ActionResult, error) {
	action, err := parseAction(req.GetInstanceName(), req.GetDigestFunction(), req.GetActionDigest())
	if err != nil {
		return nil, err
	}
	if !a.updates {
		return nil, fmt.Errorf("%w: clients may not write the action cache of this farm", errDenied)
	}
	result := req.GetActionResult()
	if result == nil {
		return nil, fmt.Errorf("%w: action_result is missing", errInvalid)
	}
	if n := proto.Size(result); n > a.limits.MaxResultBytes {
		return nil, fmt.Errorf("%w: action_result has %d bytes, at most %d are stored", errInvalid, n, a.limits.MaxResultBytes)
	}
	if err := checkPriority("results_cache_policy.priority", req.GetResultsCachePolicy().GetPriority()); err != nil {
		return nil, err
	}
	command, err := a.command(ctx, action)
	if errors.Is(err, errInvalid) || errors.Is(err, digest.ErrInvalid) {
		// Some clients keep results under the digest of a description of their own, which they upload
		// in place of an Action: moon does. Its paths are relative to the root.
		command, err = nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := checkInside(command.GetWorkingDirectory(), result); err != nil {
		return nil, err
	}
	if err := a.actions.Put(ctx, action, result); err != nil {
		return nil, err
	}
	return stored(action.Space(), result), nil
}

// command reads the Command of an action; either being absent is a missingError (row ACU-3).
func (a *actionCache) command(ctx context.Context, action digest.Digest) (*repb.Command, error) {
	message := new(repb.Action)
	if err := readMessage(ctx, a.blobs, action, a.limits.MaxActionBytes, message); err != nil {
		return nil, err
	}
	d, err := action.Space().Parse(message.GetCommandDigest())
	if err != nil {
		return nil, fmt.Errorf("command_digest of action %v: %w", action, err)
	}
	command := new(repb.Command)
	return command, readMessage(ctx, a.blobs, d, a.limits.MaxCommandBytes, command)
}

// checkInside refuses outputs outside of the input root, which would be written anywhere by the clients
// that get the result. The action cache checks the rest of the paths.
func checkInside(workingDirectory string, result *repb.ActionResult) error {
	var paths []string
	for _, file := range result.GetOutputFiles() {
		paths = append(paths, file.GetPath())
	}
	for _, directory := range result.GetOutputDirectories() {
		paths = append(paths, directory.GetPath())
	}
	for _, links := range [][]*repb.OutputSymlink{
		result.GetOutputSymlinks(),
		result.GetOutputFileSymlinks(),      //nolint:staticcheck // still sent by clients
		result.GetOutputDirectorySymlinks(), //nolint:staticcheck // still sent by clients
	} {
		for _, link := range links {
			paths = append(paths, link.GetPath())
		}
	}
	inside := path.Join("/", workingDirectory)[1:]
	for _, p := range paths {
		if clean := path.Join(inside, p); clean == ".." || strings.HasPrefix(clean, "../") {
			return fmt.Errorf("%w: action_result has the output path %s, which is outside the input root", errInvalid, digest.Quote(p))
		}
	}
	return nil
}

// stored returns result as the action cache keeps it, with digests in place of bytes.
func stored(space digest.Space, result *repb.ActionResult) *repb.ActionResult {
	result = proto.CloneOf(result)
	name := func(raw *[]byte, d **repb.Digest) {
		if len(*raw) > 0 {
			*raw, *d = nil, space.Of(*raw).Proto()
		}
	}
	name(&result.StdoutRaw, &result.StdoutDigest)
	name(&result.StderrRaw, &result.StderrDigest)
	for _, file := range result.GetOutputFiles() {
		name(&file.Contents, &file.Digest)
	}
	return result
}

// readMessage reads and decodes a message that a client stored. An absent or damaged blob is a
// missingError, so that the client uploads it again; a large or malformed one is errInvalid.
func readMessage(ctx context.Context, blobs cas.Store, d digest.Digest, limit int64, into proto.Message) error {
	kind := into.ProtoReflect().Descriptor().Name()
	if d.Size() > limit {
		missing, err := cas.Confirm(ctx, blobs, []digest.Digest{d})
		if err != nil {
			return err
		}
		if len(missing) > 0 {
			return &missingError{missing: missing}
		}
		return fmt.Errorf("%w: %s %v has %d bytes, at most %d are allowed", errInvalid, kind, d, d.Size(), limit)
	}
	b, err := readBlob(ctx, blobs, d, limit)
	if errors.Is(err, cas.ErrNotFound) || errors.Is(err, errDamaged) {
		return &missingError{missing: []digest.Digest{d}}
	}
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%w: blob %v is not a valid %s", errInvalid, d, kind)
	}
	return nil
}

func checkPriority(field string, priority int32) error {
	if priority < minPriority || priority > maxPriority {
		return fmt.Errorf("%w: %s %d is not from %d to %d", errInvalid, field, priority, minPriority, maxPriority)
	}
	return nil
}
