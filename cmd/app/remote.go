package app

import (
	"context"
	"errors"
	"fmt"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/upstream"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// blobFlags say where the blobs of a command are: on a farm's broker, or behind any cache of the
// Remote Execution API.
type blobFlags struct {
	operatorFlags `embed:""`
	Remote        string   `help:"Instead of a farm's NATS servers, any cache of the Remote Execution API." placeholder:"grpc(s)://HOST[:PORT][/INSTANCE]"`
	RemoteHeader  []string `help:"A header of every call to it, such as a token; repeat it for more." placeholder:"KEY=VALUE" sep:"none"`
}

func (f *blobFlags) config() (upstream.Config, error) {
	var cfg upstream.Config
	if f.Remote == "" {
		if len(f.RemoteHeader) > 0 {
			return cfg, run.UsageError{Err: errors.New("--remote-header needs --remote")}
		}
		return cfg, nil
	}
	var err error
	if cfg.Endpoint, err = upstream.ParseEndpoint(f.Remote); err != nil {
		return cfg, run.UsageError{Err: fmt.Errorf("--remote: %w", err)}
	}
	if cfg.Header, err = upstream.ParseHeaders(f.RemoteHeader); err != nil {
		return cfg, run.UsageError{Err: fmt.Errorf("--remote-header: %w", err)}
	}
	return cfg, nil
}

// withBlobs opens the blobs for the time of a function.
func (f *blobFlags) withBlobs(ctx context.Context, p *process, do func(ctx context.Context, blobs cas.Store) error) error {
	cfg, err := f.config()
	if err != nil {
		return err
	}
	if f.Remote == "" {
		return f.with(ctx, p, func(ctx context.Context, s *storage) error { return do(ctx, s.blobs) })
	}
	cfg.Log = p.log
	client, err := upstream.Open(ctx, cfg)
	if err != nil {
		return err
	}
	return errors.Join(do(ctx, client), client.Close())
}

// present fails unless a store has the blob.
func present(ctx context.Context, blobs cas.Store, d digest.Digest) error {
	missing, err := cas.Confirm(ctx, blobs, []digest.Digest{d})
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%w: %v", cas.ErrNotFound, d)
	}
	return err
}
