package inputs

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker/contain"
)

// Limits bounds an input root. Larger ones are ErrInvalid (row EXV-26).
type Limits struct {
	// Depth is how many directories may be inside one another.
	Depth int
	// Nodes is how many files, directories and symbolic links the whole tree may have.
	Nodes int64
	// Bytes is how large all files may be together.
	Bytes int64
	// Path is how many bytes the longest path may have.
	Path int
	// Directories is how large the distinct Directory messages may be together, in bytes.
	Directories int64
}

// DefaultLimits are for machines with some hundred GiB of disk.
func DefaultLimits() Limits {
	return Limits{Depth: 512, Nodes: 2_000_000, Bytes: 256 << 30, Path: 3 << 10, Directories: 1 << 30}
}

const (
	maxDirectory  = 64 << 20 // of the message, in bytes
	loadParallel  = 32       // directories that one Load reads at once
	cachedParsed  = 64 << 20 // of parsed directories, in bytes
	placeParallel = 16       // files that one Layout places at once
)

// Loader reads input roots from a store.
type Loader struct {
	store  cas.Store
	limits Limits
	cache  *cache
}

// NewLoader returns a loader.
func NewLoader(store cas.Store, limits Limits) *Loader {
	return &Loader{store: store, limits: limits, cache: newCache(cachedParsed)}
}

// Tree is a checked input root.
type Tree struct {
	root digest.Digest
	dirs map[digest.Digest]*directory
}

// Load reads the directories of an input root. The error wraps ErrInvalid, or is a *MissingError that
// also lists the files known so far that are missing, or is the store's.
func (l *Loader) Load(ctx context.Context, root digest.Digest) (*Tree, error) {
	t := &Tree{root: root, dirs: map[digest.Digest]*directory{}}
	var missing []digest.Digest
	known := map[digest.Digest]bool{root: true}
	size := root.Size()
	for level := []digest.Digest{root}; len(level) > 0; {
		if size > l.limits.Directories {
			return nil, fmt.Errorf("%w: the directories of the input root exceed %d bytes", ErrInvalid, l.limits.Directories)
		}
		dirs, err := l.read(ctx, level)
		if err != nil {
			return nil, err
		}
		var next []digest.Digest
		for i, dir := range dirs {
			if dir == nil {
				missing = append(missing, level[i])
				continue
			}
			t.dirs[level[i]] = dir
			for _, sub := range dir.dirs {
				if !known[sub.digest] {
					known[sub.digest] = true
					size = add(size, sub.digest.Size())
					next = append(next, sub.digest)
				}
			}
		}
		if int64(len(known)) > l.limits.Nodes {
			return nil, fmt.Errorf("%w: input root exceeds %d entries", ErrInvalid, l.limits.Nodes)
		}
		level = next
	}
	if len(missing) > 0 {
		return nil, l.missing(ctx, t, missing)
	}
	return t, l.measure(t)
}

// read returns the directories of ds, nil for each that is missing.
func (l *Loader) read(ctx context.Context, ds []digest.Digest) ([]*directory, error) {
	dirs := make([]*directory, len(ds))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(loadParallel)
	for i, d := range ds {
		if dir, ok := l.cache.get(d); ok {
			dirs[i] = dir
			continue
		}
		if d.Size() > maxDirectory {
			return nil, errors.Join(fmt.Errorf("%w: directory %s exceeds %d bytes", ErrInvalid, d.Blob(), maxDirectory), g.Wait())
		}
		g.Go(contain.Panics(func() error {
			b, err := cas.ReadAll(ctx, l.store, d, maxDirectory)
			if errors.Is(err, cas.ErrNotFound) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("read directory: %w", err)
			}
			if dirs[i], err = parse(d, b); err != nil {
				return err
			}
			l.cache.put(d, dirs[i])
			return nil
		}))
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return dirs, nil
}

// missing completes a list of missing blobs with the missing files of t.
func (l *Loader) missing(ctx context.Context, t *Tree, found []digest.Digest) error {
	absent, err := cas.Confirm(ctx, l.store, t.Files())
	if err != nil {
		return fmt.Errorf("look for missing inputs: %w", err)
	}
	return Missing(slices.Concat(found, absent))
}

// Absent returns a *MissingError with every file of t that the store does not have and with those of
// found, or nil when there are none.
func (l *Loader) Absent(ctx context.Context, t *Tree, found ...digest.Digest) error {
	return l.missing(ctx, t, found)
}

// Files returns the digests of all files, each once.
func (t *Tree) Files() []digest.Digest {
	seen := map[digest.Digest]bool{}
	var files []digest.Digest
	// Depth first from the root, each directory once, so that the order is the same every time.
	visited := map[digest.Digest]bool{}
	stack := []digest.Digest{t.root}
	for len(stack) > 0 {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		dir := t.dirs[d]
		if dir == nil || visited[d] {
			continue
		}
		visited[d] = true
		for _, f := range dir.files {
			if !seen[f.digest] {
				seen[f.digest] = true
				files = append(files, f.digest)
			}
		}
		for _, sub := range slices.Backward(dir.dirs) {
			stack = append(stack, sub.digest)
		}
	}
	return files
}
