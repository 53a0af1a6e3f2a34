package app

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/dustin/go-humanize"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/cas/memory"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cas/pack"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// memoryFlags are those of a role that keeps small blobs in memory.
type memoryFlags struct {
	MemoryCache size `help:"Bytes of small blobs kept in memory; 0 keeps none." default:"256MiB"`
	SmallCache  size `help:"Bytes of copies of small blobs kept on disk below the directory of --data; 0 keeps none." default:"4GiB"`
}

// compressionFlags are those of a role that stores blobs.
type compressionFlags struct {
	CASCompression objectstore.Compression `name:"cas-compression" help:"Which blobs this process stores compressed: ${enum}. With auto small ones, and large ones whose bytes come slowly." enum:"auto,all,off" default:"auto" env:"JETFARM_CAS_COMPRESSION"`
}

// minMemoryCache has room for some of the largest blobs that are kept in memory.
const minMemoryCache = 1 << 20

func (f *memoryFlags) validate() error {
	var errs []error
	if f.MemoryCache != 0 && f.MemoryCache < minMemoryCache {
		errs = append(errs, fmt.Errorf("--memory-cache %d bytes is less than %s and not 0", f.MemoryCache, humanize.IBytes(minMemoryCache)))
	}
	if f.SmallCache != 0 && f.SmallCache < pack.MinBytes {
		errs = append(errs, fmt.Errorf("--small-cache %d bytes is less than %s and not 0", f.SmallCache, humanize.IBytes(pack.MinBytes)))
	}
	if err := errors.Join(errs...); err != nil {
		return run.UsageError{Err: err}
	}
	return nil
}

// smallTier is small blobs in memory and in a pack, either of which may not be.
type smallTier struct {
	blobs cas.Store
	pack  *pack.Pack
}

// remember puts copies of small blobs before a store: in memory, and in dir unless that is "".
func (f *memoryFlags) remember(ctx context.Context, p *process, farm *farm, dir string, blobs cas.Store) (*smallTier, error) {
	t := &smallTier{blobs: blobs}
	if dir != "" && f.SmallCache != 0 {
		var err error
		t.pack, err = pack.Open(ctx, pack.Config{Dir: dir, MaxBytes: int64(f.SmallCache), Log: p.log, Registerer: farm.metrics})
		if err != nil {
			return nil, err
		}
	}
	if f.MemoryCache == 0 && t.pack == nil {
		return t, nil
	}
	tier, err := memory.New(memory.Config{MaxBytes: int64(f.MemoryCache), Pack: t.pack, Source: blobs, Registerer: farm.metrics})
	if err != nil {
		t.close(ctx, p)
		return nil, err
	}
	t.blobs = tier
	return t, nil
}

// smallDir is where a frontend with this directory has its pack, "" for none.
func smallDir(data string) string {
	if data == "" {
		return ""
	}
	return filepath.Join(data, "frontend", "small")
}

func (t *smallTier) services() []func(context.Context) error {
	if t.pack == nil {
		return nil
	}
	return []func(context.Context) error{t.pack.Run}
}

// close gives the directory free.
func (t *smallTier) close(ctx context.Context, p *process) {
	if t.pack == nil {
		return
	}
	if err := t.pack.Close(); err != nil {
		p.log.WarnContext(ctx, "close the pack of small blobs", "err", err)
	}
}

// frontendTier is a frontend's disk tier, or none.
type frontendTier struct {
	disk *disk.Tier
}

// openFrontendTier opens the disk tier of a frontend below data, when there is to be one.
func openFrontendTier(ctx context.Context, p *process, farm *farm, data string, maxBytes size) (*frontendTier, error) {
	if data == "" || maxBytes == 0 {
		return &frontendTier{}, nil
	}
	data, err := filepath.Abs(data)
	if err != nil {
		return nil, err
	}
	tier, err := disk.Open(ctx, disk.Config{
		Dir: filepath.Join(data, "frontend", "cache"), MaxBytes: int64(maxBytes), Source: farm.blobs, Verified: true, Log: p.log, Registerer: farm.metrics,
	})
	return &frontendTier{disk: tier}, err
}

// store is what the frontend reads from.
func (t *frontendTier) store(farm *farm) cas.Store {
	if t.disk == nil {
		return farm.blobs
	}
	return t.disk
}

func (t *frontendTier) services() []func(context.Context) error {
	if t.disk == nil {
		return nil
	}
	return []func(context.Context) error{t.disk.Run}
}

// close gives the directory free.
func (t *frontendTier) close(ctx context.Context, p *process) {
	if t.disk == nil {
		return
	}
	if err := t.disk.Close(); err != nil {
		p.log.WarnContext(ctx, "close the disk tier", "err", err)
	}
}

// checkDiskCache refuses a tier that would hold next to nothing.
func checkDiskCache(n size) error {
	if n != 0 && n < minDiskCache {
		return run.UsageError{Err: errors.New("--disk-cache is less than " + humanize.IBytes(uint64(minDiskCache)) + " and not 0")}
	}
	return nil
}
