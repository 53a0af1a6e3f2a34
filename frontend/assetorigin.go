package frontend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/asset"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend/fetch"
	"github.com/jetfarm/jetfarm/frontend/spool"
	"github.com/jetfarm/jetfarm/frontend/unpack"
)

// originCodes are the codes of what is outside of this farm's control, for the status in a response
// (row AST-4).
var originCodes = []struct { //nolint:gochecknoglobals // a table that nothing changes
	sentinel error
	code     codes.Code
}{
	{fetch.ErrChecksum, codes.Aborted},
	{fetch.ErrNotFound, codes.NotFound},
	{fetch.ErrDenied, codes.PermissionDenied},
	{fetch.ErrTimeout, codes.DeadlineExceeded},
	{fetch.ErrExhausted, codes.ResourceExhausted},
	{fetch.ErrFailed, codes.Aborted},
	{unpack.ErrTooLarge, codes.ResourceExhausted},
	{unpack.ErrInvalid, codes.Aborted},
	{unpack.ErrNoDirectory, codes.NotFound},
	{spool.ErrFull, codes.ResourceExhausted},
}

// originStatus is the status for an error of an origin, or nil for one of this farm.
func originStatus(err error) *status.Status {
	for _, row := range originCodes {
		if errors.Is(err, row.sentinel) {
			return status.New(row.code, clip(err.Error()))
		}
	}
	return nil
}

// errFetchTimeout ends a download after its own timeout.
var errFetchTimeout = fmt.Errorf("%w: the download took longer than its timeout", fetch.ErrTimeout)

// fetch asks the origins in turn until one has the content. When none has, the outcome is what the
// first one says that does not merely lack it.
func (a *assets) fetch(ctx context.Context, q *assetQuery) (assetOutcome, error) {
	timeout := a.cfg.Timeout
	if q.timeout > 0 {
		timeout = min(timeout, q.timeout)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errFetchTimeout)
	defer cancel()
	var failed assetOutcome
	for i, uri := range q.uris {
		began := time.Now()
		d, err := a.fetchFrom(ctx, q, i)
		if err == nil {
			a.remember(ctx, q.name(i), asset.Entry{Digest: d, Stored: began})
			return assetOutcome{digest: d, uri: uri}, nil
		}
		if ctx.Err() != nil && !errors.Is(context.Cause(ctx), fetch.ErrTimeout) {
			return assetOutcome{}, context.Cause(ctx)
		}
		s := originStatus(err)
		if s == nil && ctx.Err() != nil {
			s = originStatus(context.Cause(ctx))
		}
		if s == nil {
			return assetOutcome{}, err
		}
		a.log.DebugContext(ctx, "origin has not got an asset", "kind", q.kind, "uri", i, "err", err)
		if failed.status == nil || (failed.status.Code() == codes.NotFound && s.Code() != codes.NotFound) {
			failed = assetOutcome{uri: uri, status: s}
		}
		if ctx.Err() != nil {
			break
		}
	}
	return failed, nil
}

// fetchFrom downloads from one origin and stores what comes.
func (a *assets) fetchFrom(ctx context.Context, q *assetQuery, uri int) (digest.Digest, error) {
	select {
	case a.slots <- struct{}{}:
		defer func() { <-a.slots }()
	case <-ctx.Done():
		return digest.Digest{}, context.Cause(ctx)
	}
	a.metrics.downloads.Inc()
	defer a.metrics.downloads.Dec()
	check, hash := q.checksums.Check(), q.space.Function().New()
	file, err := a.fetcher.Get(ctx, q.uris[uri], q.header(uri), check, hash)
	if err != nil {
		return digest.Digest{}, err
	}
	defer file.Close() //nolint:errcheck // it was read, or that has failed already
	a.metrics.bytes.Add(float64(file.Size()))
	if err := check.Verdict(); err != nil {
		return digest.Digest{}, err
	}
	if q.kind == asset.Directory {
		return unpack.Archive(ctx, unpack.Config{
			Blobs: a.blobs, Space: q.space, Spool: a.spool, Limits: a.cfg.Unpack, Directory: q.directory,
		}, file)
	}
	d := q.space.Sum(hash, file.Size())
	return d, a.blobs.Put(ctx, d, file.Reader())
}

// remember stores a name for later requests, which can do without.
func (a *assets) remember(ctx context.Context, name asset.Name, entry asset.Entry) {
	if err := a.cfg.Names.Put(ctx, name, entry); err != nil {
		a.log.WarnContext(ctx, "fetched asset will be fetched again", "blob", entry.Digest.String(), "err", err)
	}
}

// missingOf returns what an entry stands for or refers to and the CAS does not have. Being asked for
// keeps the rest (row AST-5).
func (a *assets) missingOf(ctx context.Context, kind asset.Kind, entry asset.Entry) ([]digest.Digest, error) {
	blobs, directories := entry.Blobs, entry.Directories
	if kind == asset.Directory {
		directories = append([]digest.Digest{entry.Digest}, directories...)
	} else {
		blobs = append([]digest.Digest{entry.Digest}, blobs...)
	}
	missing, err := cas.Confirm(ctx, a.blobs, blobs)
	for _, d := range directories {
		if err != nil || len(missing) > 0 {
			break
		}
		missing, err = a.missingBelow(ctx, d)
	}
	return missing, err
}

// errMissingPart ends a walk at the first part that is missing.
var errMissingPart = errors.New("a part is missing")

// missingBelow returns parts of a directory that are missing, if any are.
func (a *assets) missingBelow(ctx context.Context, root digest.Digest) ([]digest.Digest, error) {
	const batch = 10_000
	missing, err := cas.Confirm(ctx, a.blobs, []digest.Digest{root})
	if err != nil || len(missing) > 0 {
		return missing, err
	}
	var asked []digest.Digest
	ask := func() error {
		missing, err = cas.Confirm(ctx, a.blobs, asked)
		if asked = asked[:0]; err == nil && len(missing) > 0 {
			return errMissingPart
		}
		return err
	}
	walk := &treeWalk{blobs: a.blobs, limits: a.limits, root: root}
	err = walk.run(ctx, func(part treeDirectory) error {
		for _, file := range part.directory.GetFiles() {
			d, err := root.Space().Parse(file.GetDigest())
			if err != nil {
				return err
			}
			asked = append(asked, d)
		}
		for _, child := range part.directory.GetDirectories() {
			d, err := root.Space().Parse(child.GetDigest())
			if err != nil {
				return err
			}
			asked = append(asked, d)
		}
		if len(asked) < batch {
			return nil
		}
		return ask()
	})
	if err == nil {
		err = ask()
	}
	if errors.Is(err, errMissingPart) {
		return missing, nil
	}
	return nil, err
}
