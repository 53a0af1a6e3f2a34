package actioncache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// strip is Strip into the cache's own blobs.
func (c *Cache) strip(ctx context.Context, space digest.Space, result *repb.ActionResult) error {
	return Strip(ctx, c.blobs, space, result)
}

// Strip moves the bytes in a result into blobs and leaves their digests (rows ACU-6, ACU-8). Bytes
// that do not have the digest beside them are ErrInvalid.
func Strip(ctx context.Context, blobs cas.Store, space digest.Space, result *repb.ActionResult) error {
	if err := move(ctx, blobs, space, "stdout", &result.StdoutRaw, &result.StdoutDigest); err != nil {
		return err
	}
	if err := move(ctx, blobs, space, "stderr", &result.StderrRaw, &result.StderrDigest); err != nil {
		return err
	}
	for _, f := range result.GetOutputFiles() {
		if f == nil {
			return fmt.Errorf("%w: an output file is null", ErrInvalid)
		}
		if err := move(ctx, blobs, space, "output file "+digest.Quote(f.GetPath()), &f.Contents, &f.Digest); err != nil {
			return err
		}
	}
	return nil
}

func move(ctx context.Context, blobs cas.Store, space digest.Space, what string, data *[]byte, d **repb.Digest) error {
	if len(*data) == 0 {
		return nil
	}
	sum := space.Of(*data)
	if *d != nil && ((*d).GetHash() != sum.Hash() || (*d).GetSizeBytes() != sum.Size()) {
		return fmt.Errorf("%w: %s: the bytes have the digest %s, not %s/%d", ErrInvalid, what, sum.Blob(),
			digest.Quote((*d).GetHash()), (*d).GetSizeBytes())
	}
	if err := blobs.Put(ctx, sum, bytes.NewReader(*data)); err != nil {
		return fmt.Errorf("storing %s: %w", what, err)
	}
	*data, *d = nil, sum.Proto()
	return nil
}

// validate checks what does not need the CAS: paths and symlinks (row ACU-2). Digests are checked
// where they are collected. Whether a path with `..` leaves the input root depends on the working
// directory of the Command, which only the caller knows.
func validate(result *repb.ActionResult) error {
	paths := make(outputs)
	for _, f := range result.GetOutputFiles() {
		if err := paths.add("output file", f.GetPath()); err != nil {
			return err
		}
	}
	for _, d := range result.GetOutputDirectories() {
		add := paths.add
		if d.GetPath() == "" { // the working directory itself
			add = paths.unique
		}
		if err := add("output directory", d.GetPath()); err != nil {
			return err
		}
	}
	if err := paths.symlinks(result.GetOutputSymlinks()); err != nil {
		return err
	}
	// What clients still send in the deprecated fields repeats output_symlinks.
	deprecated := make(outputs)
	return errors.Join(
		deprecated.symlinks(result.GetOutputFileSymlinks()),      //nolint:staticcheck // See above.
		deprecated.symlinks(result.GetOutputDirectorySymlinks()), //nolint:staticcheck // See above.
	)
}

// outputs are the paths of a result.
type outputs map[string]bool

func (o outputs) add(what, path string) error {
	if path == "" || path[0] == '/' || path[len(path)-1] == '/' || strings.ContainsRune(path, 0) {
		return fmt.Errorf("%w: %s %s: that is not a relative path", ErrInvalid, what, digest.Quote(path))
	}
	return o.unique(what, path)
}

func (o outputs) unique(what, path string) error {
	if o[path] {
		return fmt.Errorf("%w: %s %s: another output has the same path", ErrInvalid, what, digest.Quote(path))
	}
	o[path] = true
	return nil
}

func (o outputs) symlinks(links []*repb.OutputSymlink) error {
	for _, l := range links {
		if err := o.add("output symlink", l.GetPath()); err != nil {
			return err
		}
		if l.GetTarget() == "" {
			return fmt.Errorf("%w: output symlink %s has no target", ErrInvalid, digest.Quote(l.GetPath()))
		}
	}
	return nil
}

// Complete checks that a result is well formed and that every blob it names is present in blobs, of
// which it asks Confirm and reads the output directories. The error wraps ErrInvalid or ErrTooLarge,
// is a *MissingError or comes from the store.
func Complete(ctx context.Context, blobs cas.Store, space digest.Space, result *repb.ActionResult) error {
	return (&named{space: space, blobs: blobs}).complete(ctx, result)
}

// names returns a question for what results in this space name.
func (c *Cache) names(space digest.Space) *named { return &named{space: space, blobs: c.blobs} }

// complete is Complete, after which n has what was asked for.
func (n *named) complete(ctx context.Context, result *repb.ActionResult) error {
	if err := validate(result); err != nil {
		return err
	}
	for _, f := range result.GetOutputFiles() {
		if err := n.add(ctx, f.GetDigest(), "output file", f.GetPath()); err != nil {
			return err
		}
	}
	for _, std := range []struct {
		d    *repb.Digest
		what string
	}{{result.GetStdoutDigest(), "stdout"}, {result.GetStderrDigest(), "stderr"}} {
		if std.d == nil {
			continue
		}
		if err := n.add(ctx, std.d, std.what, ""); err != nil {
			return err
		}
	}
	for _, d := range result.GetOutputDirectories() {
		if err := n.directory(ctx, d); err != nil {
			return err
		}
	}
	return n.verdict(ctx)
}

// named collects the blobs that a result names, and asks for them in a few large questions, for
// most results a single one.
type named struct {
	space   digest.Space
	blobs   cas.Store
	asked   []digest.Digest // what is to be asked next, or was asked last
	split   bool            // whether there was an earlier question
	missing []digest.Digest
	nodes   int
	bytes   int64
}

func (n *named) add(ctx context.Context, m *repb.Digest, what, name string) error {
	d, err := n.space.Parse(m)
	if err != nil {
		return fmt.Errorf("%w: %s %s: %w", ErrInvalid, what, digest.Quote(name), err)
	}
	return n.addDigest(ctx, d)
}

func (n *named) addDigest(ctx context.Context, d digest.Digest) error {
	const batch = 10_000
	if len(n.asked) == batch {
		if err := n.ask(ctx); err != nil {
			return err
		}
		n.asked, n.split = n.asked[:0], true
	}
	n.asked = append(n.asked, d)
	return nil
}

func (n *named) ask(ctx context.Context) error {
	if len(n.asked) == 0 {
		return nil
	}
	missing, err := cas.Confirm(ctx, n.blobs, n.asked)
	n.missing = append(n.missing, missing...)
	return err
}

func (n *named) verdict(ctx context.Context) error {
	if err := n.ask(ctx); err != nil {
		return err
	}
	if len(n.missing) == 0 {
		return nil
	}
	seen := make(map[digest.Digest]bool)
	return &MissingError{Missing: slices.DeleteFunc(n.missing, func(d digest.Digest) bool {
		again := seen[d]
		seen[d] = true
		return again
	})}
}
