package frontend

import (
	"context"
	"fmt"
	"time"

	remoteasset "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/cas/asset"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// pushService serves build.bazel.remote.asset.v1.Push. Every client believes what any client has
// pushed, so it is allowed where clients may write the action cache (row AST-9).
type pushService struct {
	remoteasset.UnimplementedPushServer
	*assets
}

// pushRequest is what both Push requests have.
type pushRequest interface { //nolint:interfacebloat // the getters of a message
	GetInstanceName() string
	GetDigestFunction() repb.DigestFunction_Value
	GetUris() []string
	GetQualifiers() []*remoteasset.Qualifier
	GetExpireAt() *timestamppb.Timestamp
	GetReferencesBlobs() []*repb.Digest
	GetReferencesDirectories() []*repb.Digest
}

// PushBlob gives a blob the names of a request.
func (p pushService) PushBlob(ctx context.Context, req *remoteasset.PushBlobRequest) (*remoteasset.PushBlobResponse, error) {
	return &remoteasset.PushBlobResponse{}, p.push(ctx, asset.Blob, req, "blob_digest", req.GetBlobDigest())
}

// PushDirectory gives a directory the names of a request.
func (p pushService) PushDirectory(ctx context.Context, req *remoteasset.PushDirectoryRequest) (*remoteasset.PushDirectoryResponse, error) {
	return &remoteasset.PushDirectoryResponse{}, p.push(ctx, asset.Directory, req, "root_directory_digest", req.GetRootDirectoryDigest())
}

func (p pushService) push(ctx context.Context, kind asset.Kind, req pushRequest, field string, content *repb.Digest) error {
	if !p.pushes {
		return fmt.Errorf("%w: clients may not push assets to this farm (its operator allows it with --action-cache-updates)", errDenied)
	}
	space, err := spaceOf(req.GetInstanceName(), req.GetDigestFunction(), content)
	if err != nil {
		return err
	}
	qualifiers, err := checkAssetName(req.GetUris(), req.GetQualifiers())
	if err != nil {
		return err
	}
	entry := asset.Entry{Stored: time.Now()}
	if entry.Digest, err = space.Parse(content); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	if t := req.GetExpireAt(); t != nil {
		if t.CheckValid() != nil {
			return fmt.Errorf("%w: expire_at is no valid time", errInvalid)
		}
		entry.Expires = t.AsTime()
	}
	if n := len(req.GetReferencesBlobs()) + len(req.GetReferencesDirectories()); n > maxAssetReferences {
		return fmt.Errorf("%w: there are %d references, at most %d are allowed", errInvalid, n, maxAssetReferences)
	}
	if entry.Blobs, err = parseAll(space, "references_blobs", req.GetReferencesBlobs()); err != nil {
		return err
	}
	if entry.Directories, err = parseAll(space, "references_directories", req.GetReferencesDirectories()); err != nil {
		return err
	}
	missing, err := p.missingOf(ctx, kind, entry)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return &missingError{missing: missing}
	}
	for _, uri := range req.GetUris() {
		name := asset.Name{Space: space, Kind: kind, URI: uri, Qualifiers: identity(qualifiers)}
		if err := p.cfg.Names.Put(ctx, name, entry); err != nil {
			return err
		}
	}
	return nil
}

func parseAll(space digest.Space, field string, messages []*repb.Digest) ([]digest.Digest, error) {
	var ds []digest.Digest
	for i, m := range messages {
		d, err := space.Parse(m)
		if err != nil {
			return nil, fmt.Errorf("%s[%d]: %w", field, i, err)
		}
		ds = append(ds, d)
	}
	return ds, nil
}
