package app

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/dustin/go-humanize"

	"github.com/jetfarm/jetfarm/cas/asset"
	"github.com/jetfarm/jetfarm/cmd/run"
	"github.com/jetfarm/jetfarm/frontend"
)

// assetFlags are those of a role that offers the Remote Asset API.
type assetFlags struct {
	RemoteAsset  bool     `help:"Offer the Remote Asset API: download what clients name and keep it in the CAS." default:"true" negatable:""`
	FetchAllow   []string `help:"A network that is downloaded from beside public addresses, or 0.0.0.0/0 and ::/0 for all; repeat it for more." placeholder:"CIDR" sep:"none"`
	FetchMaxSize size     `help:"Most bytes of one download." default:"4GiB"`
	FetchSpool   size     `help:"Most bytes of downloads that are held on disk until they are whole." default:"16GiB"`
}

// minFetchSize has room for the files of most builds.
const minFetchSize = 1 << 20

func (f *assetFlags) networks() ([]netip.Prefix, error) {
	var networks []netip.Prefix
	var errs []error
	for _, text := range f.FetchAllow {
		network, err := netip.ParsePrefix(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--fetch-allow %q is not a network such as 10.1.0.0/16 or 10.1.2.3/32", text))
		}
		networks = append(networks, network.Masked())
	}
	if f.FetchMaxSize < minFetchSize || f.FetchSpool < f.FetchMaxSize {
		errs = append(errs, fmt.Errorf("--fetch-max-size must be at least %s and --fetch-spool at least as much as it", humanize.IBytes(minFetchSize)))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, run.UsageError{Err: err}
	}
	return networks, nil
}

// checkAssets reports flags that cannot work.
func (f *assetFlags) checkAssets() error {
	_, err := f.networks()
	return err
}

// assets opens what the Remote Asset API needs; nil when it is not offered. Downloads are held below
// data, or with the system's temporary files when there is none.
func (f *assetFlags) assets(ctx context.Context, p *process, farm *farm, data string) (*frontend.Assets, error) {
	if !f.RemoteAsset {
		return nil, nil //nolint:nilnil // it is the frontend's word for "not offered"
	}
	networks, err := f.networks()
	if err != nil {
		return nil, err
	}
	dir := ""
	if data != "" {
		dir = filepath.Join(data, "spool")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("directory for downloads: %w", err)
		}
	}
	names, err := asset.Open(ctx, asset.Config{Conn: farm.connections[0], Replicas: farm.client.Replicas(), Log: p.log})
	if err != nil {
		return nil, err
	}
	return &frontend.Assets{
		Names: names, Allow: networks, MaxBytes: int64(f.FetchMaxSize), SpoolDir: dir, SpoolBytes: int64(f.FetchSpool),
	}, nil
}
