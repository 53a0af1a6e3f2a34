package outputs

import (
	"fmt"
	"os"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// result adds what was found at an output to the result (rows EXO-1 to EXO-16).
func (c *Collection) result(from Source, q Requested, n *node) error {
	switch n.kind {
	case unix.S_IFREG:
		if q.Want == ADirectory {
			return fmt.Errorf("%w: output directory %s is a file", ErrRefused, digest.Quote(q.Name))
		}
		c.Result.OutputFiles = append(c.Result.OutputFiles, &repb.OutputFile{
			Path: q.Name, Digest: n.digest.Proto(), IsExecutable: n.executable,
		})
		return nil
	case unix.S_IFLNK:
		return c.symlink(from, q, n)
	}
	if q.Want == AFile {
		return fmt.Errorf("%w: output file %s is a directory", ErrRefused, digest.Quote(q.Name))
	}
	return c.directory(from, q, n)
}

// directory adds a directory as a Tree and, where the command asks for it, as Directory messages.
func (c *Collection) directory(from Source, q Requested, n *node) error {
	e := encoder{space: from.Space, known: map[digest.Digest]bool{}}
	root, err := e.encode(n)
	if err != nil {
		return err
	}
	tree := e.tree()
	d := from.Space.Of(tree)
	c.add(d, blob{data: tree})
	out := &repb.OutputDirectory{Path: q.Name, TreeDigest: d.Proto(), IsTopologicallySorted: true}
	if from.Format == repb.Command_DIRECTORY_ONLY || from.Format == repb.Command_TREE_AND_DIRECTORY {
		for _, dir := range e.dirs {
			c.add(dir.digest, blob{data: dir.data})
		}
		out.RootDirectoryDigest = root.Proto()
	}
	c.Result.OutputDirectories = append(c.Result.OutputDirectories, out)
	return nil
}

// symlink adds a symbolic link as it is. Clients of the older fields, and some of the newer, read the
// lists that tell files from directories; a link that leads nowhere or out of the execution root is
// what was asked for, or a file.
func (c *Collection) symlink(from Source, q Requested, n *node) error {
	toDir, known := target(from.Root, n.path)
	switch {
	case known && toDir && q.Want == AFile:
		return fmt.Errorf("%w: output file %s is a symbolic link to a directory", ErrRefused, digest.Quote(q.Name))
	case known && !toDir && q.Want == ADirectory:
		return fmt.Errorf("%w: output directory %s is a symbolic link to a file", ErrRefused, digest.Quote(q.Name))
	case !known:
		toDir = q.Want == ADirectory
	}
	link := &repb.OutputSymlink{Path: q.Name, Target: n.target}
	if q.Want == Anything {
		c.Result.OutputSymlinks = append(c.Result.OutputSymlinks, link)
	}
	if toDir {
		c.Result.OutputDirectorySymlinks = append(c.Result.OutputDirectorySymlinks, link) //nolint:staticcheck // clients of REAPI 2.0 use these fields
	} else {
		c.Result.OutputFileSymlinks = append(c.Result.OutputFileSymlinks, link) //nolint:staticcheck // clients of REAPI 2.0 use these fields
	}
	return nil
}

// target tells whether a symbolic link leads to a directory, as far as that can be known without
// leaving the execution root.
func target(root, path string) (dir, known bool) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return false, false
	}
	defer r.Close() //nolint:errcheck // nothing was written
	info, err := r.Stat(path)
	if err != nil {
		return false, false
	}
	return info.IsDir(), true
}

// Stdout takes the action's standard output from a file, of which it reads at most limit bytes.
func (c *Collection) Stdout(space digest.Space, file string, limit int64) error {
	d, err := c.stream(space, file, limit)
	c.Result.StdoutDigest = d
	return err
}

// Stderr is Stdout for the standard error.
func (c *Collection) Stderr(space digest.Space, file string, limit int64) error {
	d, err := c.stream(space, file, limit)
	c.Result.StderrDigest = d
	return err
}
