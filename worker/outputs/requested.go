package outputs

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// ErrInvalid reports output paths or a working directory that a client must change.
var ErrInvalid = errors.New("invalid path")

// Want is what kind of thing a command promises at a path.
type Want int

// Anything is what output_paths asks for; the others are those of the older fields.
const (
	Anything Want = iota
	AFile
	ADirectory
	// Either is a path that is in both of the older fields.
	Either
)

// Requested is one output of a command.
type Requested struct {
	// Name is the path exactly as the command has it, relative to the working directory.
	Name string
	// At is the same as a clean slash-separated path relative to the input root; "" is the root.
	At   string
	Want Want
}

const (
	maxPath    = 4096
	maxSegment = 255
	maxPaths   = 200_000
)

// WorkingDirectory checks a command's working directory and returns it (row EXV-15). The error wraps
// ErrInvalid.
func WorkingDirectory(c *repb.Command) (string, error) {
	dir := c.GetWorkingDirectory()
	if dir == "" {
		return "", nil
	}
	at, err := resolve("", dir)
	if err != nil {
		return "", fmt.Errorf("%w: working directory %s: %w", ErrInvalid, digest.Quote(dir), err)
	}
	return at, nil
}

// Of returns the outputs that a command names, each once, in its order. The older fields count only
// when output_paths is empty (rows EXV-6 to EXV-13). The error wraps ErrInvalid.
func Of(c *repb.Command) ([]Requested, error) {
	dir, err := WorkingDirectory(c)
	if err != nil {
		return nil, err
	}
	r := requests{dir: dir, index: map[string]int{}}
	lists := []list{{"output_paths", c.GetOutputPaths(), Anything}}
	if len(c.GetOutputPaths()) == 0 {
		lists = []list{{"output_files", c.GetOutputFiles(), AFile}, {"output_directories", c.GetOutputDirectories(), ADirectory}} //nolint:staticcheck // clients of REAPI 2.0 use these fields
	}
	for _, l := range lists {
		if len(l.names) > maxPaths {
			return nil, fmt.Errorf("%w: %s has %d entries, at most %d are allowed", ErrInvalid, l.field, len(l.names), maxPaths)
		}
		for _, name := range l.names {
			if err := r.add(name, l.want); err != nil {
				return nil, fmt.Errorf("%w: %s %s: %w", ErrInvalid, l.field, digest.Quote(name), err)
			}
		}
	}
	return r.all, r.nested()
}

type list struct {
	field string
	names []string
	want  Want
}

type requests struct {
	dir   string
	all   []Requested
	index map[string]int // by name
}

func (r *requests) add(name string, want Want) error {
	at := r.dir
	if name != "" {
		var err error
		if at, err = resolve(r.dir, name); err != nil {
			return err
		}
	} else if want == AFile {
		return errors.New("the path is empty")
	}
	i, again := r.index[name]
	switch {
	case !again:
		r.index[name] = len(r.all)
		r.all = append(r.all, Requested{Name: name, At: at, Want: want})
	case want == AFile:
		return errors.New("the path is there twice")
	case r.all[i].Want == AFile:
		r.all[i].Want = Either
	}
	return nil
}

// nested refuses an output file below another output file (row EXV-11).
func (r *requests) nested() error {
	files := map[string]bool{}
	for _, q := range r.all {
		if q.Want == AFile {
			files[q.At] = true
		}
	}
	for _, q := range r.all {
		if q.Want != AFile {
			continue
		}
		for i := range len(q.At) {
			if q.At[i] == '/' && files[q.At[:i]] {
				return fmt.Errorf("%w: output_files %s is below the output file %s", ErrInvalid, digest.Quote(q.Name), digest.Quote(q.At[:i]))
			}
		}
	}
	return nil
}

// resolve joins a client's path to dir and cleans it. A path that leaves the input root is an error
// (row EXV-9), as is every other form than the canonical one, except for leading "..".
func resolve(dir, name string) (string, error) {
	switch {
	case strings.HasPrefix(name, "/"):
		return "", errors.New("the path is absolute")
	case strings.HasSuffix(name, "/"):
		return "", errors.New("the path ends in a slash")
	case len(name) > maxPath:
		return "", fmt.Errorf("the path has %d bytes, at most %d are possible", len(name), maxPath)
	case strings.Contains(name, "\x00"):
		return "", errors.New("the path contains NUL")
	case !utf8.ValidString(name):
		return "", errors.New("the path is not UTF-8")
	}
	for segment := range strings.SplitSeq(name, "/") {
		switch {
		case segment == "":
			return "", errors.New("the path has an empty segment")
		case segment == ".":
			return "", errors.New(`the path has the segment "."`)
		case len(segment) > maxSegment:
			return "", fmt.Errorf("a segment has %d bytes, at most %d are possible", len(segment), maxSegment)
		}
	}
	at := path.Join(dir, name)
	switch {
	case at == "..", strings.HasPrefix(at, "../"):
		return "", errors.New("the path leaves the input root")
	case at == ".":
		return "", nil
	}
	return at, nil
}
