package unpack

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas/digest"
)

var (
	// ErrInvalid reports an archive that is damaged, of an unknown kind, or has entries that are refused.
	ErrInvalid = errors.New("archive is refused")
	// ErrTooLarge reports an archive that exceeds a bound.
	ErrTooLarge = errors.New("archive is too large")
	// ErrNoDirectory reports that the directory that was asked for is not in the archive.
	ErrNoDirectory = errors.New("directory is not in the archive")
)

const (
	maxName   = 255
	maxPath   = 4096
	maxTarget = 4096
)

// node is a file, a link or a directory; exactly one of its fields is set.
type node struct {
	file     *repb.FileNode
	target   string
	children map[string]*node
}

func newDirectory() *node { return &node{children: make(map[string]*node)} }

// tree is what was unpacked so far.
type tree struct {
	root    *node
	entries int
	limits  Limits
}

func newTree(limits Limits) *tree { return &tree{root: newDirectory(), limits: limits} }

// split cuts the name of an entry into valid segments; the archive's own root has none. The rules for
// them are those for names in a Directory (row EXV-18).
func split(name string, limits Limits) ([]string, error) {
	if len(name) > maxPath {
		return nil, fmt.Errorf("%w: a name has %d bytes, at most %d are allowed", ErrInvalid, len(name), maxPath)
	}
	if strings.HasPrefix(name, "/") {
		return nil, fmt.Errorf("%w: %s is an absolute name", ErrInvalid, digest.Quote(name))
	}
	if !utf8.ValidString(name) || strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("%w: %s is not UTF-8 or has a zero byte", ErrInvalid, digest.Quote(name))
	}
	var segments []string
	for segment := range strings.SplitSeq(name, "/") {
		switch {
		case segment == "" || segment == ".": // as in ./a//b/
			continue
		case segment == "..":
			return nil, fmt.Errorf("%w: %s has the segment ..: it climbs", ErrInvalid, digest.Quote(name))
		case len(segment) > maxName:
			return nil, fmt.Errorf("%w: %s has a segment of %d bytes, at most %d are allowed", ErrInvalid, digest.Quote(name), len(segment), maxName)
		}
		segments = append(segments, segment)
	}
	if len(segments) > limits.Depth {
		return nil, fmt.Errorf("%w: %s is %d levels deep, at most %d are allowed", ErrTooLarge, digest.Quote(name), len(segments), limits.Depth)
	}
	return segments, nil
}

// grow counts one more entry.
func (t *tree) grow() error {
	if t.entries++; t.entries > t.limits.Entries {
		return fmt.Errorf("%w: it has more than %d entries", ErrTooLarge, t.limits.Entries)
	}
	return nil
}

// directory returns the directory of these segments and makes those that are missing.
func (t *tree) directory(segments []string) (*node, error) {
	at := t.root
	for i, segment := range segments {
		next := at.children[segment]
		if next == nil {
			if err := t.grow(); err != nil {
				return nil, err
			}
			next = newDirectory()
			at.children[segment] = next
		}
		if next.children == nil {
			return nil, fmt.Errorf("%w: %s is a file or link and a directory", ErrInvalid, digest.Quote(strings.Join(segments[:i+1], "/")))
		}
		at = next
	}
	return at, nil
}

// add adds a file or a link.
func (t *tree) add(name string, n *node) error {
	if err := t.grow(); err != nil {
		return err
	}
	segments, err := split(name, t.limits)
	if err != nil {
		return err
	}
	if len(segments) == 0 || strings.HasSuffix(name, "/") {
		return fmt.Errorf("%w: %s is the name of a directory, not of a file", ErrInvalid, digest.Quote(name))
	}
	last := len(segments) - 1
	parent, err := t.directory(segments[:last])
	if err != nil {
		return err
	}
	if parent.children[segments[last]] != nil {
		return fmt.Errorf("%w: %s comes twice", ErrInvalid, digest.Quote(name))
	}
	if n.file != nil {
		n.file.Name = segments[last]
	}
	parent.children[segments[last]] = n
	return nil
}

// addDirectory adds a directory; it may be there.
func (t *tree) addDirectory(name string) error {
	if err := t.grow(); err != nil {
		return err
	}
	segments, err := split(name, t.limits)
	if err != nil {
		return err
	}
	_, err = t.directory(segments)
	return err
}

// addHardLink adds another name for a file that was added before.
func (t *tree) addHardLink(name, to string) error {
	segments, err := split(to, t.limits)
	if err != nil {
		return err
	}
	found := t.find(segments)
	if found == nil || found.file == nil {
		return fmt.Errorf("%w: %s is a hard link to %s, which is no file before it", ErrInvalid, digest.Quote(name), digest.Quote(to))
	}
	return t.add(name, &node{file: &repb.FileNode{Digest: found.file.GetDigest(), IsExecutable: found.file.GetIsExecutable()}})
}

// addLink adds a symbolic link. Whether it leads out of the directory is seen at the end, when it is
// known what the directory is.
func (t *tree) addLink(name, target string) error {
	switch {
	case target == "" || len(target) > maxTarget || !utf8.ValidString(target) || strings.ContainsRune(target, 0):
		return fmt.Errorf("%w: the link %s has the target %s", ErrInvalid, digest.Quote(name), digest.Quote(target))
	case strings.HasPrefix(target, "/"):
		return fmt.Errorf("%w: the link %s leads to %s, an absolute name", ErrInvalid, digest.Quote(name), digest.Quote(target))
	}
	return t.add(name, &node{target: target})
}

// find returns what has these segments, or nil.
func (t *tree) find(segments []string) *node {
	at := t.root
	for _, segment := range segments {
		if at = at.children[segment]; at == nil {
			return nil
		}
	}
	return at
}

// staysInside tells whether a link in a directory of this depth stays below the root, whatever other
// links there are: `..` may only come first, where it goes through real directories, since after the
// name of a link it leads to wherever that is.
func staysInside(target string, depth int) bool {
	down := false
	for segment := range strings.SplitSeq(target, "/") {
		switch segment {
		case "", ".":
		case "..":
			if depth--; down || depth < 0 {
				return false
			}
		default:
			down = true
		}
	}
	return true
}
