package outputs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/worker/contain"
)

// Collector turns files into results.
type Collector struct {
	// Blobs is where outputs go.
	Blobs cas.Store
	// Files adopts them as well.
	Files  *disk.Tier
	Limits Limits
}

// Source says what to collect and where.
type Source struct {
	// Root is the execution root. No process that could change it is alive.
	Root string
	// UID is the user that the action ran as, or -1 for the worker's own.
	UID int
	// Space is the key space of the action's digests.
	Space digest.Space
	// Outputs are what the command names.
	Outputs []Requested
	// Format is the command's output_directory_format.
	Format repb.Command_OutputDirectoryFormat
}

// Collection is a result whose blobs are still on this machine.
type Collection struct {
	// Result has the outputs that exist. Standard output and error are added by Stdout and Stderr.
	Result *repb.ActionResult

	uid   int
	root  *os.File
	order []digest.Digest
	blobs map[digest.Digest]blob
}

// blob is where the bytes of a digest are: in memory, or in a file below root or, with an absolute
// path, anywhere.
type blob struct {
	data       []byte
	path       string
	executable bool
	adopt      bool
	identity   identity // of the file when it was sealed, with adopt
}

// Close ends the use of the execution root.
func (c *Collection) Close() error { return c.root.Close() }

// Collect finds and hashes the outputs that exist. Those that don't are no error. When the error wraps
// ErrRefused the collection is returned all the same, without outputs, to take the standard output and
// error of the action. A collection that is returned must be closed.
func (c *Collector) Collect(ctx context.Context, from Source) (*Collection, error) {
	root, err := os.Open(from.Root)
	if err != nil {
		return nil, err
	}
	out := &Collection{Result: &repb.ActionResult{}, uid: from.UID, root: root, blobs: map[digest.Digest]blob{}}
	err = c.collect(ctx, from, out)
	if errors.Is(err, ErrRefused) {
		out.Result = &repb.ActionResult{}
		out.order, out.blobs = nil, map[digest.Digest]blob{}
		return out, err
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return out, nil
}

func (c *Collector) collect(ctx context.Context, from Source, out *Collection) error {
	s := scanner{root: out.root, limits: c.Limits}
	found := make([]*node, len(from.Outputs))
	for i, q := range from.Outputs {
		n, err := s.scan(ctx, q.At, 1)
		if err != nil {
			return err
		}
		found[i] = n
	}
	if err := hashAll(ctx, out, from, s.files); err != nil {
		return err
	}
	for _, n := range s.files {
		out.add(n.digest, blob{path: n.path, executable: n.executable, adopt: n.sealed, identity: n.identity})
	}
	for i, n := range found {
		if n == nil {
			continue
		}
		if err := out.result(from, from.Outputs[i], n); err != nil {
			return err
		}
	}
	return nil
}

// add remembers where a blob is. One that can be adopted is preferred.
func (c *Collection) add(d digest.Digest, b blob) {
	if d.IsEmpty() {
		return
	}
	old, again := c.blobs[d]
	if !again {
		c.order = append(c.order, d)
	}
	if !again || b.adopt && !old.adopt {
		c.blobs[d] = b
	}
}

func hashAll(ctx context.Context, out *Collection, from Source, files []*node) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, n := range files {
		g.Go(contain.Panics(func() error { return hashNode(ctx, out.root, from, n) }))
	}
	return g.Wait()
}

// hashNode seals a file and hashes it.
func hashNode(ctx context.Context, root *os.File, from Source, n *node) (err error) {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	entry, err := open(ctx, root, n.path, unix.O_PATH)
	if err != nil {
		return err
	}
	defer entry.Close() //nolint:errcheck // nothing was written
	if err := checkFile(entry, from.UID); err != nil {
		return err
	}
	f, err := openFor(ctx, root, entry, n.path, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// What is at the path may be another file by now.
	if err := checkFile(f, from.UID); err != nil {
		return err
	}
	if n.identity, n.sealed, err = seal(f, from.UID, n.executable); err != nil {
		return err
	}
	n.digest, err = hash(ctx, f, from.Space, n.size)
	return err
}

// checkFile refuses what is not a regular file that the action may read.
func checkFile(f *os.File, uid int) error {
	st, err := stat(f)
	switch {
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%w: %s was a file and is none any more", ErrRefused, digest.Quote(f.Name()))
	case uid >= 0 && int(st.Uid) != uid && st.Mode&unix.S_IROTH == 0:
		return fmt.Errorf("%w: %s is a link to a file of another user that the action can't read", ErrRefused, digest.Quote(f.Name()))
	}
	return nil
}

// seal makes f a file that only the worker can write, and tells whether it is and how to know it again.
// Files that the action did not make, such as hard links of cached inputs, stay as they are, and so do
// those with extended attributes, which would outlive the seal and which may be an access control list.
// A file that somebody has open for writing, for instance an accomplice in another slot who got the
// descriptor through a socket, is not sealed: the kernel grants no read lease on it.
func seal(f *os.File, uid int, executable bool) (identity, bool, error) {
	st, err := stat(f)
	if err != nil || !isBare(f) {
		return identity{}, false, err
	}
	if uid < 0 {
		return identityOf(st), st.Nlink == 1 && int(st.Uid) == os.Geteuid(), nil
	}
	if int(st.Uid) != uid {
		return identity{}, false, nil
	}
	mode := os.FileMode(0o444)
	if executable {
		mode = 0o555
	}
	// The mode goes first so that another output which is a link of the same file is readable at any time.
	if err := errors.Join(f.Chmod(mode), f.Chown(0, 0)); err != nil {
		return identity{}, false, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		return identity{}, false, nil //nolint:nilerr // no lease is the answer
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		return identity{}, false, nil //nolint:nilerr // as above
	}
	if st, err = stat(f); err != nil {
		return identity{}, false, err
	}
	return identityOf(st), st.Uid == 0 && st.Mode&0o7777 == uint32(mode) && isBare(f), nil
}

func hash(ctx context.Context, f *os.File, space digest.Space, size int64) (digest.Digest, error) {
	h := space.Function().New()
	buffer := make([]byte, min(128<<10, size+1))
	var n int64
	for {
		if ctx.Err() != nil {
			return digest.Digest{}, context.Cause(ctx)
		}
		m, err := f.Read(buffer)
		h.Write(buffer[:m])
		n += int64(m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return digest.Digest{}, err
		}
		if n > size {
			break
		}
	}
	if n != size {
		return digest.Digest{}, fmt.Errorf("%s changed its size from %d while it was hashed", digest.Quote(f.Name()), size)
	}
	return space.Sum(h, n), nil
}
