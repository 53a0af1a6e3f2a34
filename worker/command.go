package worker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker/contain"
	"github.com/jetfarm/jetfarm/worker/inputs"
	"github.com/jetfarm/jetfarm/worker/outputs"
)

// errInvalid reports an action that its client must change. The text says what is wrong.
var errInvalid = errors.New("invalid action")

// The largest messages that are read into memory.
const (
	maxAction  = 1 << 20
	maxCommand = 64 << 20
)

// task is a checked action with its command and input tree.
type task struct {
	args       []string
	env        []string
	dir        string // the working directory below the input root
	timeout    time.Duration
	doNotCache bool
	outputs    []outputs.Requested
	format     repb.Command_OutputDirectoryFormat
	tree       *inputs.Tree
}

// read fetches and checks an action. The error wraps errInvalid, inputs.ErrInvalid or
// outputs.ErrInvalid, is an *inputs.MissingError with everything that is missing, or is the storage's.
func (w *Worker) read(ctx context.Context, spec *broker.Job) (*task, error) {
	d := spec.Action
	data, err := spec.ActionData, error(nil)
	if d.Space().Of(data) != d {
		data, err = w.bytes(ctx, d, maxAction)
	}
	if errors.Is(err, cas.ErrNotFound) {
		return nil, inputs.Missing([]digest.Digest{d})
	}
	if err != nil {
		return nil, fmt.Errorf("read the action: %w", err)
	}
	var action repb.Action
	if err := unmarshal(d, data, &action); err != nil {
		return nil, err
	}
	command, err := d.Space().Parse(action.GetCommandDigest())
	if err != nil {
		return nil, fmt.Errorf("%w: command_digest: %w", errInvalid, err)
	}
	root, err := d.Space().Parse(action.GetInputRootDigest())
	if err != nil {
		return nil, fmt.Errorf("%w: input_root_digest: %w", errInvalid, err)
	}
	t := &task{doNotCache: action.GetDoNotCache()}
	if t.timeout, err = w.timeout(action.GetTimeout()); err != nil {
		return nil, err
	}
	if err := w.readBoth(ctx, t, command, root); err != nil {
		return nil, err
	}
	return t, t.checkTree()
}

// readBoth reads the command and the input tree.
func (w *Worker) readBoth(ctx context.Context, t *task, command, root digest.Digest) error {
	var data []byte
	var commandErr error
	var g errgroup.Group
	g.Go(contain.Panics(func() error {
		data, commandErr = w.bytes(ctx, command, maxCommand)
		return nil
	}))
	tree, treeErr := w.loader.Load(ctx, root)
	if err := g.Wait(); err != nil {
		return err
	}
	t.tree = tree
	if errors.Is(commandErr, cas.ErrNotFound) {
		return w.alsoMissing(ctx, command, tree, treeErr)
	}
	if commandErr != nil {
		return commandErr
	}
	var c repb.Command
	if err := unmarshal(command, data, &c); err != nil {
		return err
	}
	if err := t.command(&c); err != nil {
		return err
	}
	return treeErr
}

// alsoMissing names everything that is missing besides the command, so that the client can upload it
// in one go.
func (w *Worker) alsoMissing(ctx context.Context, command digest.Digest, tree *inputs.Tree, treeErr error) error {
	var missing *inputs.MissingError
	switch {
	case treeErr == nil:
		return w.loader.Absent(ctx, tree, command)
	case errors.As(treeErr, &missing):
		return inputs.Missing(append([]digest.Digest{command}, missing.Missing...))
	}
	return treeErr
}

// bytes reads a blob of at most limit bytes; a larger one wraps errInvalid.
func (w *Worker) bytes(ctx context.Context, d digest.Digest, limit int64) ([]byte, error) {
	if d.Size() > limit {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", errInvalid, d.Blob(), limit)
	}
	return cas.ReadAll(ctx, w.cfg.Blobs, d, limit)
}

func unmarshal(d digest.Digest, data []byte, m proto.Message) error {
	if err := proto.Unmarshal(data, m); err != nil {
		return fmt.Errorf("%w: %s is not a valid %s: %w", errInvalid, d.Blob(), m.ProtoReflect().Descriptor().Name(), err)
	}
	return nil
}

// timeout checks an action's timeout; a zero one is unset (rows EXA-17 to EXA-19).
func (w *Worker) timeout(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return w.cfg.DefaultTimeout, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, fmt.Errorf("%w: timeout: %w", errInvalid, err)
	}
	timeout := d.AsDuration()
	switch {
	case d.GetSeconds() < 0 || d.GetNanos() < 0:
		return 0, fmt.Errorf("%w: the timeout %v is negative", errInvalid, timeout)
	case d.GetSeconds() > int64(w.cfg.MaxTimeout/time.Second) || timeout > w.cfg.MaxTimeout:
		return 0, fmt.Errorf("%w: the timeout of %d s is longer than the maximum of %v", errInvalid, d.GetSeconds(), w.cfg.MaxTimeout)
	case timeout == 0:
		return w.cfg.DefaultTimeout, nil
	}
	return timeout, nil
}

// limit is how long an attempt takes at most if none of its steps hangs: each has a timeout of its own, and
// what has none, such as cleaning up, shares the grace. An action that did not come with its job may have
// any timeout.
func (w *Worker) limit(spec *broker.Job) time.Duration {
	timeout := w.cfg.MaxTimeout
	var action repb.Action
	if len(spec.ActionData) > 0 && proto.Unmarshal(spec.ActionData, &action) == nil {
		if t, err := w.timeout(action.GetTimeout()); err == nil {
			timeout = t
		}
	}
	// Fetching is reading the input tree and then laying it out; a large response is uploaded after the outputs.
	return timeout + 2*w.cfg.FetchTimeout + 2*w.cfg.UploadTimeout + w.cfg.Grace
}

// command checks a command by itself (rows EXV-3 to EXV-17).
func (t *task) command(c *repb.Command) (err error) {
	if len(c.GetArguments()) == 0 || c.GetArguments()[0] == "" {
		return fmt.Errorf("%w: the command has no arguments", errInvalid)
	}
	for i, a := range c.GetArguments() {
		if strings.Contains(a, "\x00") {
			return fmt.Errorf("%w: argument %d contains NUL: %s", errInvalid, i, digest.Quote(a))
		}
	}
	seen := map[string]bool{}
	for _, v := range c.GetEnvironmentVariables() {
		name := v.GetName()
		switch {
		case name == "" || strings.ContainsAny(name, "=\x00"):
			return fmt.Errorf("%w: %s is not the name of an environment variable", errInvalid, digest.Quote(name))
		case strings.Contains(v.GetValue(), "\x00"):
			return fmt.Errorf("%w: the environment variable %s contains NUL", errInvalid, digest.Quote(name))
		case seen[name]:
			return fmt.Errorf("%w: the environment variable %s is there twice", errInvalid, digest.Quote(name))
		}
		seen[name] = true
		t.env = append(t.env, name+"="+v.GetValue())
	}
	if p := c.GetOutputNodeProperties(); len(p) > 0 {
		return fmt.Errorf("%w: output_node_properties %s is not supported (supported: none)", errInvalid, digest.Quote(p[0]))
	}
	t.args, t.format = c.GetArguments(), c.GetOutputDirectoryFormat()
	if t.dir, err = outputs.WorkingDirectory(c); err != nil {
		return err
	}
	t.outputs, err = outputs.Of(c)
	return err
}

// checkTree checks the command against the input tree (rows EXV-14 and EXV-27).
func (t *task) checkTree() error {
	if t.tree.Lookup(t.dir) != inputs.Directory {
		return fmt.Errorf("%w: the working directory %s is not a directory of the input root", errInvalid, digest.Quote(t.dir))
	}
	for _, o := range t.outputs {
		if at := t.tree.Obstacle(o.At); at != "" {
			return fmt.Errorf("%w: the output %s can't be created because %s is a file or a symbolic link of the input root",
				errInvalid, digest.Quote(o.Name), digest.Quote(at))
		}
	}
	return nil
}

// layout returns where the tree is to be laid out for the task.
func (t *task) layout(dir string) inputs.Layout {
	to := inputs.Layout{Dir: dir, Private: map[string]bool{}}
	for _, o := range t.outputs {
		if t.tree.Lookup(o.At) == inputs.File {
			to.Private[o.At] = true
		}
		to.Parents = append(to.Parents, o.At)
	}
	return to
}
