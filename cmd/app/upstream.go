package app

import (
	"context"
	"errors"
	"fmt"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/upstream"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// upstreamFlags are those of a role with another cache behind it.
type upstreamFlags struct {
	Upstream       string   `help:"Another cache of the Remote Execution API behind this farm: what is not here is read from it, and what is stored here is copied to it." placeholder:"grpc(s)://HOST[:PORT][/INSTANCE]"`
	UpstreamCA     string   `name:"upstream-ca" help:"PEM certificates that a grpcs:// upstream is signed by. Default: those of the system." type:"existingfile" placeholder:"FILE"`
	UpstreamHeader []string `help:"A header of every call to the upstream, such as a token; repeat it for more. It is never logged." placeholder:"KEY=VALUE" sep:"none"`
}

// config returns what the flags say, and problems as a run.UsageError.
func (f *upstreamFlags) config() (upstream.Config, error) {
	cfg := upstream.Config{CA: f.UpstreamCA}
	if f.Upstream == "" {
		if f.UpstreamCA != "" || len(f.UpstreamHeader) > 0 {
			return cfg, run.UsageError{Err: errors.New("--upstream-ca and --upstream-header need --upstream")}
		}
		return cfg, nil
	}
	endpoint, err := upstream.ParseEndpoint(f.Upstream)
	if err == nil && f.UpstreamCA != "" && !endpoint.Secure {
		err = errors.New("--upstream-ca needs an address that begins with grpcs://")
	}
	if err != nil {
		err = run.UsageError{Err: fmt.Errorf("--upstream: %w", err)}
	}
	header, bad := upstream.ParseHeaders(f.UpstreamHeader)
	if bad != nil {
		bad = run.UsageError{Err: fmt.Errorf("--upstream-header: %w", bad)}
	}
	cfg.Endpoint, cfg.Header = endpoint, header
	return cfg, errors.Join(err, bad)
}

// checkUpstream reports what is wrong with the flags.
func (f *upstreamFlags) checkUpstream() error {
	_, err := f.config()
	return err
}

// served is what a frontend reads and writes: the farm's stores, with an upstream behind them when
// there is one.
type served struct {
	blobs   cas.Store
	results actioncache.Results
	// executed tells the upstream of executed actions; nil without one.
	executed func(action digest.Digest)

	client  *upstream.Client // nil without an upstream, as are these
	tier    *upstream.Tier
	actions *upstream.Actions
}

// behind puts the upstream behind a farm whose blobs are read and written through the tiers given.
func (f *upstreamFlags) behind(ctx context.Context, p *process, farm *farm, blobs cas.Store) (*served, error) {
	s := &served{blobs: blobs, results: farm.actions}
	cfg, err := f.config()
	if f.Upstream == "" || err != nil {
		return s, err
	}
	cfg.Log, cfg.Registerer = p.log, farm.metrics
	if s.client, err = upstream.Open(ctx, cfg); err != nil {
		return nil, err
	}
	s.tier = upstream.New(blobs, s.client)
	s.actions = upstream.NewActions(farm.actions, s.tier)
	s.blobs, s.results, s.executed = s.tier, s.actions, s.actions.Executed
	return s, nil
}

func (s *served) services() []func(context.Context) error {
	if s.client == nil {
		return nil
	}
	return []func(context.Context) error{s.tier.Run, s.actions.Run}
}

// close ends the connections to the upstream, after everything that uses them has ended.
func (s *served) close(ctx context.Context, p *process) {
	if s.client == nil {
		return
	}
	if err := s.client.Close(); err != nil {
		p.log.WarnContext(ctx, "close the upstream cache", "err", err)
	}
}
