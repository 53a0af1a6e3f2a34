package frontend

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	remoteasset "github.com/bazelbuild/remote-apis/build/bazel/remote/asset/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/asset"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend/fetch"
	"github.com/jetfarm/jetfarm/frontend/spool"
	"github.com/jetfarm/jetfarm/frontend/unpack"
)

// Assets is what the Remote Asset API needs. A zero bound takes its default.
type Assets struct {
	// Names remembers what was fetched and pushed.
	Names *asset.Names
	// Allow are networks that are fetched from beside the public Internet.
	Allow []netip.Prefix
	// MaxBytes bounds one download. 4 GiB by default.
	MaxBytes int64
	// SpoolDir is where downloads are held until their digest is known, the system's directory of
	// temporary files by default; SpoolBytes bounds them together, 16 GiB by default.
	SpoolDir   string
	SpoolBytes int64
	// Concurrency bounds the downloads that run at once. 32 by default.
	Concurrency int
	// Timeout is the longest and, for requests that set none, the usual time of a download. 10 min by
	// default.
	Timeout time.Duration
	// Stall bounds how long an origin may send nothing. 30 s by default.
	Stall time.Duration
	// Unpack bounds what archives may become.
	Unpack unpack.Limits
	// TLS and Resolver reach the origins; nil is the system's.
	TLS      *tls.Config
	Resolver *net.Resolver
}

func (a Assets) withDefaults() Assets {
	orDefault(&a.MaxBytes, 4<<30)
	orDefault(&a.SpoolBytes, 16<<30)
	orDefault(&a.Concurrency, 32)
	orDefault(&a.Timeout, 10*time.Minute)
	orDefault(&a.Stall, 30*time.Second)
	return a
}

// assets is what both services of the Remote Asset API share.
type assets struct {
	cfg     Assets
	blobs   cas.Store
	limits  Limits
	log     *slog.Logger
	metrics *assetMetrics
	fetcher *fetch.Fetcher
	spool   *spool.Pool
	flights *assetFlights
	slots   chan struct{} // has room for the downloads that run
	pushes  bool
}

func newAssets(cfg Config) *assets {
	c := cfg.Assets.withDefaults()
	a := &assets{
		cfg: c, blobs: cfg.Blobs, limits: cfg.Limits, log: cfg.Log, pushes: cfg.AllowActionCacheUpdates,
		spool: spool.NewPool(c.SpoolDir, c.SpoolBytes), flights: newAssetFlights(), slots: make(chan struct{}, c.Concurrency),
	}
	a.fetcher = fetch.New(fetch.Config{
		Spool: a.spool, Allow: c.Allow, MaxBytes: min(c.MaxBytes, cfg.Limits.MaxBlobBytes), Stall: c.Stall, TLS: c.TLS, Resolver: c.Resolver,
	})
	a.metrics = newAssetMetrics(cfg.Registerer, a.spool.Used)
	return a
}

// close ends all downloads and waits for them. a may be nil.
func (a *assets) close() {
	if a != nil {
		a.flights.close()
		a.fetcher.Close()
	}
}

// assetOutcome is what came of a request: a digest, or the status of why its origins gave none.
type assetOutcome struct {
	digest digest.Digest
	uri    string
	status *status.Status // nil for success
}

// fetchService serves build.bazel.remote.asset.v1.Fetch.
type fetchService struct {
	remoteasset.UnimplementedFetchServer
	*assets
}

// FetchBlob finds or downloads a file. What an origin does wrong is in the response's status, not the
// call's (row AST-4).
func (f fetchService) FetchBlob(ctx context.Context, req *remoteasset.FetchBlobRequest) (*remoteasset.FetchBlobResponse, error) {
	q, err := f.query(asset.Blob, req)
	if err != nil {
		return nil, err
	}
	out, err := f.resolve(ctx, q)
	if err != nil {
		return nil, err
	}
	resp := &remoteasset.FetchBlobResponse{
		Uri: out.uri, Qualifiers: req.GetQualifiers(), Status: out.status.Proto(), DigestFunction: q.space.Function().Proto(),
	}
	if out.status == nil {
		resp.Status, resp.BlobDigest = status.New(codes.OK, "").Proto(), out.digest.Proto()
	}
	return resp, nil
}

// FetchDirectory finds a directory, or downloads an archive and unpacks it.
func (f fetchService) FetchDirectory(ctx context.Context, req *remoteasset.FetchDirectoryRequest) (*remoteasset.FetchDirectoryResponse, error) {
	q, err := f.query(asset.Directory, req)
	if err != nil {
		return nil, err
	}
	out, err := f.resolve(ctx, q)
	if err != nil {
		return nil, err
	}
	resp := &remoteasset.FetchDirectoryResponse{
		Uri: out.uri, Qualifiers: req.GetQualifiers(), Status: out.status.Proto(), DigestFunction: q.space.Function().Proto(),
	}
	if out.status == nil {
		resp.Status, resp.RootDirectoryDigest = status.New(codes.OK, "").Proto(), out.digest.Proto()
	}
	return resp, nil
}

// resolve answers from the CAS or from what was fetched or pushed before, and asks the origins else.
func (a *assets) resolve(ctx context.Context, q *assetQuery) (assetOutcome, error) {
	out, from, err := a.known(ctx, q)
	if err == nil && from == "" {
		if len(q.unsupported) > 0 {
			err = &unsupportedError{q.unsupported}
		} else {
			from = "origin"
			out, err = a.flights.join(ctx, q.key(), func(ctx context.Context) (assetOutcome, error) { return a.fetch(ctx, q) })
		}
	}
	result := "ok"
	switch {
	case err != nil:
		result = "error"
	case out.status != nil:
		result = out.status.Code().String()
	}
	a.metrics.requests.WithLabelValues(string(q.kind), from, result).Inc()
	return out, err
}

// known looks for content that needs no download. from is empty when there is none.
func (a *assets) known(ctx context.Context, q *assetQuery) (out assetOutcome, from string, err error) {
	if d, ok, err := a.byChecksum(ctx, q); ok || err != nil {
		return assetOutcome{digest: d, uri: q.uris[0]}, "cas", err
	}
	for i, uri := range q.uris {
		entry, err := a.cfg.Names.Get(ctx, q.name(i))
		if isNotFound(err) || (err == nil && entry.Stored.Before(q.oldest)) {
			continue
		}
		if err != nil {
			return out, "", err
		}
		missing, err := a.missingOf(ctx, q.kind, entry)
		if err != nil {
			return out, "", err
		}
		if len(missing) == 0 {
			return assetOutcome{digest: entry.Digest, uri: uri}, "name", nil
		}
	}
	return out, "", nil
}

// byChecksum finds a blob that the CAS has under the very checksum that is asked for, unless the client
// wants to be sure that its URI still has it.
func (a *assets) byChecksum(ctx context.Context, q *assetQuery) (digest.Digest, bool, error) {
	if q.kind != asset.Blob || q.canonical || !q.oldest.IsZero() || len(q.unsupported) > 0 {
		return digest.Digest{}, false, nil
	}
	for _, sum := range q.checksums {
		if sum.Algorithm != q.space.Function().String() {
			continue
		}
		d, err := cas.Find(ctx, a.blobs, q.space, fmt.Sprintf("%x", sum.Sum))
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return d, false, err
		}
		missing, err := cas.Confirm(ctx, a.blobs, []digest.Digest{d})
		if err != nil || len(missing) == 0 {
			return d, err == nil, err
		}
	}
	return digest.Digest{}, false, nil
}
