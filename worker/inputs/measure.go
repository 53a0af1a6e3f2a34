package inputs

import (
	"fmt"
	"math"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// extent is the size of the tree below a directory, in which every directory counts as often as it is
// referred to.
type extent struct {
	depth int
	nodes int64
	bytes int64
	path  int
}

// measure checks a tree against the limits without walking it: each distinct directory is looked at
// once. The error wraps ErrInvalid.
func (l *Loader) measure(t *Tree) error {
	total, err := l.extent(t, t.root, map[digest.Digest]extent{}, 1)
	if err != nil {
		return err
	}
	switch {
	case total.nodes > l.limits.Nodes:
		return fmt.Errorf("%w: input root exceeds %d entries", ErrInvalid, l.limits.Nodes)
	case total.bytes > l.limits.Bytes:
		return fmt.Errorf("%w: input root exceeds %d bytes", ErrInvalid, l.limits.Bytes)
	case total.path > l.limits.Path:
		return fmt.Errorf("%w: input root exceeds paths of %d bytes", ErrInvalid, l.limits.Path)
	}
	return nil
}

func (l *Loader) extent(t *Tree, d digest.Digest, known map[digest.Digest]extent, level int) (extent, error) {
	e, ok := known[d]
	if !ok {
		e.depth = 1
	}
	if level+e.depth-1 > l.limits.Depth {
		return extent{}, fmt.Errorf("%w: input root exceeds a depth of %d directories", ErrInvalid, l.limits.Depth)
	}
	if ok {
		return e, nil
	}
	dir := t.dirs[d]
	e.nodes = int64(len(dir.files) + len(dir.dirs) + len(dir.symlinks))
	for _, f := range dir.files {
		e.bytes = add(e.bytes, f.digest.Size())
		e.path = max(e.path, len(f.name))
	}
	for _, s := range dir.symlinks {
		e.path = max(e.path, len(s.name))
	}
	for _, sub := range dir.dirs {
		below, err := l.extent(t, sub.digest, known, level+1)
		if err != nil {
			return extent{}, err
		}
		e.depth = max(e.depth, below.depth+1)
		e.nodes = add(e.nodes, below.nodes)
		e.bytes = add(e.bytes, below.bytes)
		e.path = max(e.path, len(sub.name)+1+below.path)
	}
	known[d] = e
	return e, nil
}

// add adds without overflow.
func add(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}
