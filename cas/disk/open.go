package disk

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Open takes over the directory and lists what it holds. ctx bounds the listing, which takes about
// a second for a million files.
func Open(ctx context.Context, cfg Config) (*Tier, error) {
	switch {
	case cfg.Dir == "":
		return nil, errors.New("disk tier: the directory is not set")
	case cfg.MaxBytes <= 0:
		return nil, fmt.Errorf("disk tier %s: a size of %d bytes holds nothing", cfg.Dir, cfg.MaxBytes)
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("disk tier: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("disk tier: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("disk tier: %w", err)
	}
	t := &Tier{
		source: cfg.Source, log: cfg.Log, max: cfg.MaxBytes, dir: dir, lock: lock, asRoot: os.Geteuid() == 0, second: cfg.SecondRead, believe: cfg.Verified,
		fetching: make(chan struct{}, fetches), pressure: make(chan struct{}, 1),
		index: newIndex(), flights: make(map[key]*flight),
	}
	if err := t.load(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("disk tier: %w", err), lock.Close())
	}
	if t.metrics, err = newMetrics(cfg.Registerer, t); err != nil {
		return nil, errors.Join(fmt.Errorf("disk tier: %w", err), lock.Close())
	}
	return t, nil
}

// lockDir keeps other processes out. The kernel drops the lock when the process dies.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s is in use by another process: %w", dir, err), f.Close())
	}
	return f, nil
}

func (t *Tier) load(ctx context.Context) error {
	if err := os.RemoveAll(filepath.Join(t.dir, "tmp")); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(t.dir, "tmp"), 0o700); err != nil {
		return err
	}
	var all []entry
	var stray []string
	for i := range shards {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		entries, bad, err := t.list(shard(byte(i)))
		if err != nil {
			return err
		}
		all, stray = append(all, entries...), append(stray, bad...)
	}
	// Generations grow, so their order is that of the first uses.
	slices.SortFunc(all, func(a, b entry) int { return cmp.Compare(a.generation, b.generation) })
	for _, e := range all {
		if old, replaced := t.index.insert(e); replaced {
			stray = append(stray, t.path(old)) // left by a kill between the two steps of a replacement
		}
	}
	for _, path := range stray {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	last := uint64(0)
	if len(all) > 0 {
		last = all[len(all)-1].generation
	}
	return t.boot(last)
}

// list reads the names of one shard. Bad ones are not from this program or this version of it.
func (t *Tier) list(shard string) (entries []entry, bad []string, err error) {
	path := filepath.Join(t.dir, "cas", shard)
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	names, err := f.Readdirnames(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, nil, err
	}
	entries = make([]entry, 0, len(names))
	for _, name := range names {
		space, e, ok := parseName(name)
		if !ok || hexUint(uint64(e.key.hash[0]) | 0x100)[1:] != shard {
			bad = append(bad, filepath.Join(path, name))
			continue
		}
		e.key.space = t.index.spaceByName(space)
		entries = append(entries, e)
	}
	return entries, bad, nil
}

// boot finds out which files this boot of the machine has written and so has in its page cache.
// The file boot says during which boot the tier was last used and the first generation of that.
func (t *Tier) boot(last uint64) error {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		id = nil // then nothing is trusted
	}
	id = bytes.TrimSpace(id)
	path := filepath.Join(t.dir, "boot")
	noted, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if fields := strings.Fields(string(noted)); len(fields) == 2 && len(id) > 0 && fields[0] == string(id) {
		if first, err := strconv.ParseUint(fields[1], 10, 64); err == nil {
			t.trusted = first
			t.generations.Store(max(last, first))
			return nil
		}
	}
	t.trusted = last + 1
	t.generations.Store(t.trusted)
	note := fmt.Sprintf("%s %d\n", id, t.trusted)
	if err := os.WriteFile(path+".new", []byte(note), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func hexUint(v uint64) string { return strconv.FormatUint(v, 16) }
