package inputs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/worker/contain"
)

// Layout says where and how a tree becomes files.
type Layout struct {
	// Dir is the directory that becomes the input root. It may exist if it is empty and belongs to UID.
	Dir string
	// UID owns the directories, so that the action can create files in them; -1 is the worker's user.
	UID int
	// Files is where the content comes from.
	Files *disk.Tier
	// Copies makes every file a copy that the action may write. Otherwise files are read-only and may
	// be shared with the tier: the action must not run as the user who owns them.
	Copies bool
	// Private names files, by their path in the tree, that become copies owned by UID in any case.
	Private map[string]bool
	// Parents names files and directories, by their path in the tree, whose parents must exist.
	Parents []string
}

// Place creates the tree in the file system. Symbolic links are created verbatim and never followed.
// The error is a *MissingError with all missing files when one was missing.
func (l *Loader) Place(ctx context.Context, t *Tree, to Layout) error {
	g, placing := errgroup.WithContext(ctx)
	g.SetLimit(placeParallel)
	p := placer{tree: t, to: to, group: g}
	err := p.directory(placing, t.root, "")
	if waited := g.Wait(); waited != nil {
		err = waited
	}
	if absent, ok := errors.AsType[*absentError](err); ok {
		return l.Absent(ctx, t, absent.digest)
	}
	if err != nil {
		return err
	}
	return p.parents()
}

// absentError says which file was missing.
type absentError struct{ digest digest.Digest }

func (e *absentError) Error() string { return "missing: " + e.digest.Blob() }

type placer struct {
	tree  *Tree
	to    Layout
	group *errgroup.Group
}

// directory creates one directory and what is in it; path is "" or ends in a slash. Files are placed
// by the group, so at the end some may not be there yet.
func (p *placer) directory(ctx context.Context, d digest.Digest, path string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := p.mkdir(path); err != nil && (path != "" || !errors.Is(err, fs.ErrExist)) {
		return err
	}
	dir := p.tree.dirs[d]
	for _, f := range dir.files {
		p.group.Go(contain.Panics(func() error { return p.file(ctx, f, path+f.name) }))
	}
	for _, s := range dir.symlinks {
		name := p.to.Dir + "/" + path + s.name
		err := os.Symlink(s.target, name)
		if err == nil && p.to.UID >= 0 {
			err = os.Lchown(name, p.to.UID, p.to.UID)
		}
		if err != nil {
			return err
		}
	}
	for _, sub := range dir.dirs {
		if err := p.directory(ctx, sub.digest, path+sub.name+"/"); err != nil {
			return err
		}
	}
	return nil
}

func (p *placer) mkdir(path string) error {
	name := p.to.Dir
	if path != "" {
		name += "/" + strings.TrimSuffix(path, "/")
	}
	if err := os.Mkdir(name, 0o755); err != nil {
		return err
	}
	if p.to.UID < 0 {
		return nil
	}
	return os.Lchown(name, p.to.UID, p.to.UID)
}

func (p *placer) file(ctx context.Context, f file, path string) error {
	name := p.to.Dir + "/" + path
	private := p.to.Private[path]
	place := p.to.Files.Link
	if private || p.to.Copies {
		place = p.to.Files.Copy
	}
	err := place(ctx, f.digest, f.executable, name)
	switch {
	case errors.Is(err, cas.ErrNotFound):
		return &absentError{digest: f.digest}
	case err != nil:
		return fmt.Errorf("place input %s: %w", digest.Quote(path), err)
	case private && p.to.UID >= 0:
		return os.Lchown(name, p.to.UID, p.to.UID)
	}
	return nil
}

// parents creates the directories above each of to.Parents. No component of them is anything else than
// a directory: Obstacle says so beforehand.
func (p *placer) parents() error {
	for _, path := range p.to.Parents {
		for i := range len(path) {
			if path[i] != '/' {
				continue
			}
			if err := p.mkdir(path[:i+1]); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
	}
	return nil
}

// Kind is what an input root has at a path.
type Kind int

// The kinds.
const (
	Absent Kind = iota
	Directory
	File
	Symlink
)

// Lookup returns what is at a slash-separated path; "" is the root. What is below a file or a
// symbolic link is absent.
func (t *Tree) Lookup(path string) Kind {
	kind, rest := t.walk(path)
	if rest != "" {
		return Absent
	}
	return kind
}

// Obstacle returns the path of the file or symbolic link that is in the way of creating something at
// path, or "".
func (t *Tree) Obstacle(path string) string {
	kind, rest := t.walk(path)
	if rest == "" || kind == Directory || kind == Absent {
		return ""
	}
	return strings.TrimSuffix(strings.TrimSuffix(path, rest), "/")
}

// walk descends along path and returns the last thing it meets and what of path is left then.
func (t *Tree) walk(path string) (Kind, string) {
	dir := t.dirs[t.root]
	for path != "" {
		name, rest, _ := strings.Cut(path, "/")
		kind, sub := dir.lookup(name)
		if kind != Directory {
			return kind, rest
		}
		dir, path = t.dirs[sub], rest
	}
	return Directory, ""
}

func (d *directory) lookup(name string) (Kind, digest.Digest) {
	if i, ok := search(d.dirs, name, func(s subdirectory) string { return s.name }); ok {
		return Directory, d.dirs[i].digest
	}
	if _, ok := search(d.files, name, func(f file) string { return f.name }); ok {
		return File, digest.Digest{}
	}
	if _, ok := search(d.symlinks, name, func(s symlink) string { return s.name }); ok {
		return Symlink, digest.Digest{}
	}
	return Absent, digest.Digest{}
}
