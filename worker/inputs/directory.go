package inputs

import (
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// directory is a checked Directory message. It is immutable and may belong to many trees.
type directory struct {
	files    []file
	dirs     []subdirectory
	symlinks []symlink
	cost     int64 // about how many bytes it takes in memory
}

type file struct {
	name       string
	digest     digest.Digest
	executable bool
}

type subdirectory struct {
	name   string
	digest digest.Digest
}

type symlink struct{ name, target string }

// The longest name and symbolic link target that Linux has.
const (
	maxName   = 255
	maxTarget = 4095
)

// parse checks the bytes of a Directory (rows EXV-18 to EXV-24). The error wraps ErrInvalid.
func parse(d digest.Digest, data []byte) (*directory, error) {
	var m repb.Directory
	if err := proto.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("%w: %s is not a Directory: %w", ErrInvalid, d.Blob(), err)
	}
	dir, err := check(d.Space(), &m)
	if err != nil {
		return nil, fmt.Errorf("%w: directory %s: %w", ErrInvalid, d.Blob(), err)
	}
	dir.cost = int64(200 + 3*len(data))
	return dir, nil
}

func check(space digest.Space, m *repb.Directory) (*directory, error) {
	dir := &directory{
		files:    make([]file, 0, len(m.GetFiles())),
		dirs:     make([]subdirectory, 0, len(m.GetDirectories())),
		symlinks: make([]symlink, 0, len(m.GetSymlinks())),
	}
	seen := make(map[string]bool, len(m.GetFiles())+len(m.GetDirectories())+len(m.GetSymlinks()))
	names := namesOf{seen: seen}
	for _, n := range m.GetFiles() {
		d, err := names.next(space, "files", n.GetName(), n.GetDigest())
		if err != nil {
			return nil, err
		}
		dir.files = append(dir.files, file{name: n.GetName(), digest: d, executable: n.GetIsExecutable()})
	}
	names = namesOf{seen: seen}
	for _, n := range m.GetDirectories() {
		d, err := names.next(space, "directories", n.GetName(), n.GetDigest())
		if err != nil {
			return nil, err
		}
		dir.dirs = append(dir.dirs, subdirectory{name: n.GetName(), digest: d})
	}
	names = namesOf{seen: seen}
	for _, n := range m.GetSymlinks() {
		if err := names.check("symlinks", n.GetName()); err != nil {
			return nil, err
		}
		if err := checkTarget(n.GetTarget()); err != nil {
			return nil, fmt.Errorf("symbolic link %s: %w", digest.Quote(n.GetName()), err)
		}
		dir.symlinks = append(dir.symlinks, symlink{name: n.GetName(), target: n.GetTarget()})
	}
	return dir, nil
}

// namesOf checks the names of one list against each other and against those of the other lists.
type namesOf struct {
	seen map[string]bool
	last string
}

func (n *namesOf) next(space digest.Space, list, name string, d *repb.Digest) (digest.Digest, error) {
	if err := n.check(list, name); err != nil {
		return digest.Digest{}, err
	}
	parsed, err := space.Parse(d)
	if err != nil {
		return digest.Digest{}, fmt.Errorf("%s in %s: %w", digest.Quote(name), list, err)
	}
	return parsed, nil
}

func (n *namesOf) check(list, name string) error {
	switch {
	case name == "", name == ".", name == "..":
		return fmt.Errorf("%s in %s is not the name of an entry", digest.Quote(name), list)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("name %s in %s contains a slash or NUL", digest.Quote(name), list)
	case len(name) > maxName:
		return fmt.Errorf("name %s in %s has %d bytes, at most %d are possible", digest.Quote(name), list, len(name), maxName)
	case n.seen[name]:
		return fmt.Errorf("two entries have the name %s", digest.Quote(name))
	case name < n.last:
		return fmt.Errorf("%s are not sorted: %s is after %s", list, digest.Quote(name), digest.Quote(n.last))
	}
	n.seen[name], n.last = true, name
	return nil
}

func checkTarget(target string) error {
	switch {
	case target == "":
		return fmt.Errorf("the target is empty")
	case strings.Contains(target, "\x00"):
		return fmt.Errorf("the target contains NUL")
	case len(target) > maxTarget:
		return fmt.Errorf("the target has %d bytes, at most %d are possible", len(target), maxTarget)
	}
	return nil
}

// search finds a name in one of a directory's sorted lists.
func search[E any](list []E, name string, nameOf func(E) string) (int, bool) {
	return slices.BinarySearchFunc(list, name, func(e E, name string) int { return strings.Compare(nameOf(e), name) })
}
