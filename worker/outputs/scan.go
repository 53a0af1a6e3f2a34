package outputs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// ErrRefused reports an output that can't be a result because of what the action made. The text names
// its path.
var ErrRefused = errors.New("output refused")

// Limits bounds the outputs of one action (row EXO-33). What exceeds them is ErrRefused.
type Limits struct {
	Nodes int64 // files, directories and symbolic links together
	Bytes int64 // of all files together, by their size rather than by what they take on disk
	Depth int   // of directories inside one another
	Names int64 // bytes of all paths, from the execution root, and targets of symbolic links together
}

// DefaultLimits are generous.
func DefaultLimits() Limits {
	return Limits{Nodes: 1_000_000, Bytes: 64 << 30, Depth: 256, Names: 256 << 20}
}

// maxOpen is the longest path that can be opened.
const maxOpen = 4000

// node is one thing that was found: a regular file, a directory or a symbolic link.
type node struct {
	name       string
	path       string // from the execution root
	size       int64
	executable bool
	digest     digest.Digest // of a file, once it is hashed
	sealed     bool          // nobody but the worker can write the file any more
	identity   identity      // of a sealed file
	target     string        // of a symbolic link
	kind       uint32        // S_IFREG, S_IFDIR or S_IFLNK
	children   []*node       // of a directory, sorted by name
}

type scanner struct {
	root   *os.File
	limits Limits
	nodes  int64
	bytes  int64
	names  int64
	files  []*node
}

// scan returns what is at path with everything below it, or nil when there is nothing.
func (s *scanner) scan(ctx context.Context, path string, depth int) (*node, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := s.count(path, depth); err != nil {
		return nil, err
	}
	entry, err := open(ctx, s.root, path, unix.O_PATH)
	if err != nil {
		if isAbsent(err) {
			return nil, nil //nolint:nilnil // nothing is there, and that is no error
		}
		return nil, err
	}
	defer entry.Close() //nolint:errcheck // nothing was written
	st, err := stat(entry)
	if err != nil {
		return nil, err
	}
	n := &node{path: path, kind: st.Mode & unix.S_IFMT, size: st.Size, executable: st.Mode&unix.S_IXUSR != 0}
	switch n.kind {
	case unix.S_IFREG:
		if s.bytes += st.Size; s.bytes > s.limits.Bytes {
			return nil, fmt.Errorf("%w: output limit of %d bytes exceeded at %s", ErrRefused, s.limits.Bytes, digest.Quote(path))
		}
		s.files = append(s.files, n)
	case unix.S_IFLNK:
		if n.target, err = readlink(entry); err != nil {
			return nil, err
		}
		if s.names += int64(len(n.target)); s.names > s.limits.Names {
			return nil, s.tooLong(path)
		}
		if !utf8.ValidString(n.target) {
			return nil, fmt.Errorf("%w: the target of the symbolic link %s is not UTF-8: %s", ErrRefused, digest.Quote(path), digest.Quote(n.target))
		}
	case unix.S_IFDIR:
		n.children, err = s.children(ctx, entry, path, depth)
	default:
		err = fmt.Errorf("%w: %s is %s", ErrRefused, digest.Quote(path), special(st.Mode))
	}
	return n, err
}

func (s *scanner) count(path string, depth int) error {
	s.nodes++
	s.names += int64(len(path))
	switch {
	case s.names > s.limits.Names:
		return s.tooLong(path)
	case s.nodes > s.limits.Nodes:
		return s.tooMany(path)
	case depth > s.limits.Depth:
		return fmt.Errorf("%w: output limit of %d directories inside one another exceeded at %s", ErrRefused, s.limits.Depth, digest.Quote(path))
	case len(path) > maxOpen:
		return fmt.Errorf("%w: output limit of %d bytes in a path exceeded at %s", ErrRefused, maxOpen, digest.Quote(path))
	}
	return nil
}

func (s *scanner) tooMany(path string) error {
	return fmt.Errorf("%w: output limit of %d files, directories and symbolic links exceeded at %s", ErrRefused, s.limits.Nodes, digest.Quote(path))
}

func (s *scanner) tooLong(path string) error {
	return fmt.Errorf("%w: output limit of %d bytes in paths and symbolic links exceeded at %s", ErrRefused, s.limits.Names, digest.Quote(path))
}

func (s *scanner) children(ctx context.Context, entry *os.File, path string, depth int) ([]*node, error) {
	names, err := s.list(ctx, entry, path)
	if err != nil {
		return nil, err
	}
	children := make([]*node, 0, len(names))
	for _, name := range names {
		if !utf8.ValidString(name) {
			return nil, fmt.Errorf("%w: the name %s in %s is not UTF-8", ErrRefused, digest.Quote(name), digest.Quote(path))
		}
		at := name
		if path != "" {
			at = path + "/" + name
		}
		child, err := s.scan(ctx, at, depth+1)
		if err != nil {
			return nil, err
		}
		if child == nil {
			return nil, fmt.Errorf("%s vanished while it was collected", digest.Quote(at))
		}
		child.name = name
		children = append(children, child)
	}
	return children, nil
}

// list returns the names in a directory, sorted by bytes.
func (s *scanner) list(ctx context.Context, entry *os.File, path string) ([]string, error) {
	dir, err := openFor(ctx, s.root, entry, path, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer dir.Close() //nolint:errcheck // nothing was written
	var names []string
	size := s.names
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		some, err := dir.Readdirnames(4096)
		names = append(names, some...)
		for _, name := range some {
			size += int64(len(name))
		}
		if len(some) == 0 {
			break
		}
		if err != nil {
			return nil, err
		}
		if int64(len(names)) > s.limits.Nodes {
			return nil, s.tooMany(path)
		}
		if size > s.limits.Names {
			return nil, s.tooLong(path)
		}
	}
	slices.Sort(names)
	return names, nil
}
