package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// CASTree prints a directory.
type CASTree struct {
	blobFlags  `embed:""`
	spaceFlags `embed:""`
	Digest     string `arg:"" help:"HASH/SIZE, HASH or a resource name of a Directory, Tree, Action or Command."`
	Depth      int    `help:"Levels that are printed; 0 prints all." default:"0"`
	Limit      int    `help:"Most entries that are printed; 0 prints all." default:"100000"`
}

func (c *CASTree) run(ctx context.Context, p *process) error {
	if c.Depth < 0 || c.Limit < 0 {
		return run.UsageError{Err: errors.New("--depth and --limit must not be negative")}
	}
	if err := c.check(c.Digest); err != nil {
		return err
	}
	return c.withBlobs(ctx, p, func(ctx context.Context, blobs cas.Store) error { return c.print(ctx, p.out, blobs) })
}

func (c *CASTree) print(ctx context.Context, out io.Writer, blobs cas.Store) error {
	d, err := c.find(ctx, blobs, c.Digest)
	if err != nil {
		return err
	}
	data, err := readMessageBytes(ctx, blobs, d)
	if err != nil {
		return err
	}
	t := &treePrinter{out: out, space: d.Space(), depth: c.Depth, limit: c.Limit, load: func(d digest.Digest) (*repb.Directory, error) {
		return loadDirectory(ctx, blobs, d)
	}}
	switch m := recognise(d.Space(), data).(type) {
	case *repb.Directory:
		err = t.print(m, "", 1)
	case *repb.Tree:
		err = t.tree(m)
	case *repb.Action:
		err = t.action(d, m)
	case *repb.Command:
		err = t.command(d, m)
	default:
		return fmt.Errorf("%v is no Directory, Tree, Action or Command; 'jetfarm cas get' reads it", d)
	}
	switch {
	case errors.Is(err, errLimit):
		return fmt.Errorf("more than %d entries; --limit prints more, --depth less", c.Limit)
	case err == nil && t.unread > 0:
		return fmt.Errorf("%d directories can't be read", t.unread)
	}
	return err
}

func loadDirectory(ctx context.Context, s cas.Store, d digest.Digest) (*repb.Directory, error) {
	data, err := readMessageBytes(ctx, s, d)
	if err != nil {
		return nil, err
	}
	m, ok := recognise(d.Space(), data).(*repb.Directory)
	if !ok {
		return nil, fmt.Errorf("%v is no Directory", d)
	}
	return m, nil
}

// recognise decodes a message whose kind is not known. Protobuf does not tell, so this goes by what
// only one kind has: all its fields are known, and its digests are digests.
func recognise(space digest.Space, data []byte) proto.Message { //nolint:ireturn // any of four kinds
	if m := new(repb.Directory); decode(data, m) && isDirectory(space, m) {
		return m
	}
	if m := new(repb.Action); decode(data, m) && isDigest(space, m.GetCommandDigest()) && isDigest(space, m.GetInputRootDigest()) {
		return m
	}
	if m := new(repb.Tree); decode(data, m) && m.GetRoot() != nil && isDirectory(space, m.GetRoot()) {
		return m
	}
	if m := new(repb.Command); decode(data, m) && len(m.GetArguments()) > 0 {
		return m
	}
	return nil
}

func isDigest(space digest.Space, d *repb.Digest) bool {
	_, err := space.Parse(d)
	return err == nil
}

func isDirectory(space digest.Space, d *repb.Directory) bool {
	return !slices.ContainsFunc(d.GetFiles(), func(f *repb.FileNode) bool {
		return f.GetName() == "" || !isDigest(space, f.GetDigest())
	}) && !slices.ContainsFunc(d.GetDirectories(), func(sub *repb.DirectoryNode) bool {
		return sub.GetName() == "" || !isDigest(space, sub.GetDigest())
	}) && !slices.ContainsFunc(d.GetSymlinks(), func(l *repb.SymlinkNode) bool {
		return l.GetName() == "" || l.GetTarget() == ""
	})
}

// decode tells whether data is such a message without fields that are not known.
func decode(data []byte, m proto.Message) bool {
	return proto.Unmarshal(data, m) == nil && !hasUnknown(m.ProtoReflect())
}

func hasUnknown(m protoreflect.Message) (unknown bool) {
	if len(m.GetUnknown()) > 0 {
		return true
	}
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case field.Message() == nil || field.IsMap():
		case field.IsList():
			for i := 0; i < v.List().Len() && !unknown; i++ {
				unknown = hasUnknown(v.List().Get(i).Message())
			}
		default:
			unknown = hasUnknown(v.Message())
		}
		return !unknown
	})
	return unknown
}

// treePrinter prints directories with what is below them.
type treePrinter struct {
	out          io.Writer
	space        digest.Space
	depth, limit int
	load         func(digest.Digest) (*repb.Directory, error)
	printed      int
	unread       int // directories that could not be read
}

func (t *treePrinter) line(format string, v ...any) error {
	if t.printed++; t.limit > 0 && t.printed > t.limit {
		return errLimit
	}
	_, err := fmt.Fprintf(t.out, format+"\n", v...)
	return err
}

// print prints the entries of a directory at this level. One that can't be read is said so, and the
// others follow.
func (t *treePrinter) print(d *repb.Directory, path string, level int) error {
	for _, f := range d.GetFiles() {
		mark := " "
		if f.GetIsExecutable() {
			mark = "*"
		}
		if err := t.line("%s%s %s", printable(path+f.GetName()), mark, parseIn(t.space, f.GetDigest())); err != nil {
			return err
		}
	}
	for _, l := range d.GetSymlinks() {
		if err := t.line("%s -> %s", printable(path+l.GetName()), printable(l.GetTarget())); err != nil {
			return err
		}
	}
	for _, sub := range d.GetDirectories() {
		if err := t.below(sub, path+sub.GetName()+"/", level); err != nil {
			return err
		}
	}
	return nil
}

// below prints a directory with what is in it.
func (t *treePrinter) below(sub *repb.DirectoryNode, name string, level int) error {
	if err := t.line("%s  %s", printable(name), parseIn(t.space, sub.GetDigest())); err != nil {
		return err
	}
	if t.depth > 0 && level >= t.depth {
		return nil
	}
	d, err := t.space.Parse(sub.GetDigest())
	var directory *repb.Directory
	if err == nil {
		directory, err = t.load(d)
	}
	if err != nil {
		t.unread++
		return t.line("%s  can't be read: %v", printable(name), err)
	}
	return t.print(directory, name, level+1)
}

// tree prints a Tree, whose directories come with it.
func (t *treePrinter) tree(m *repb.Tree) error {
	children := make(map[digest.Digest]*repb.Directory, len(m.GetChildren()))
	for _, child := range m.GetChildren() {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(child)
		if err != nil {
			return err
		}
		children[t.space.Of(data)] = child
	}
	t.load = func(d digest.Digest) (*repb.Directory, error) {
		if child := children[d]; child != nil {
			return child, nil
		}
		return nil, errors.New("it is not in the Tree")
	}
	return t.print(m.GetRoot(), "", 1)
}

func (t *treePrinter) action(d digest.Digest, m *repb.Action) error {
	lines := []string{"Action " + d.Blob(), "command     " + parseIn(t.space, m.GetCommandDigest()), "input root  " + parseIn(t.space, m.GetInputRootDigest())}
	if m.GetTimeout() != nil {
		lines = append(lines, "timeout     "+m.GetTimeout().AsDuration().String())
	}
	if m.GetDoNotCache() {
		lines = append(lines, "not cached")
	}
	for _, property := range m.GetPlatform().GetProperties() {
		lines = append(lines, "platform    "+printable(property.GetName()+"="+property.GetValue()))
	}
	lines = append(lines, "(jetfarm cas tree prints these digests as well)")
	_, err := fmt.Fprintln(t.out, strings.Join(lines, "\n"))
	return err
}

func (t *treePrinter) command(d digest.Digest, m *repb.Command) error {
	lines := []string{"Command " + d.Blob()}
	for _, argument := range m.GetArguments() {
		lines = append(lines, "argument    "+printable(argument))
	}
	for _, variable := range m.GetEnvironmentVariables() {
		lines = append(lines, "environment "+printable(variable.GetName()+"="+variable.GetValue()))
	}
	if m.GetWorkingDirectory() != "" {
		lines = append(lines, "directory   "+printable(m.GetWorkingDirectory()))
	}
	outputs := m.GetOutputPaths()
	if len(outputs) == 0 {
		outputs = append(append(outputs, m.GetOutputFiles()...), m.GetOutputDirectories()...) //nolint:staticcheck // still sent
	}
	for _, path := range outputs {
		lines = append(lines, "output      "+printable(path))
	}
	_, err := fmt.Fprintln(t.out, strings.Join(lines, "\n"))
	return err
}
