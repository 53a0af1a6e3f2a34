package unpack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend/spool"
)

// Limits bounds what an archive may become. A zero field takes its default.
type Limits struct {
	// Entries bounds files, links and directories together. 200 000 by default.
	Entries int
	// Bytes bounds the unpacked bytes of all files. 16 GiB by default.
	Bytes int64
	// Depth bounds the levels of directories. 100 by default.
	Depth int
}

func (l Limits) withDefaults() Limits {
	if l.Entries == 0 {
		l.Entries = 200_000
	}
	if l.Bytes == 0 {
		l.Bytes = 16 << 30
	}
	if l.Depth == 0 {
		l.Depth = 100
	}
	return l
}

// Config says where directories go.
type Config struct {
	Blobs  cas.Store
	Space  digest.Space
	Spool  *spool.Pool
	Limits Limits
	// Directory is what of the archive is wanted, by its name in it; empty is all.
	Directory string
}

const (
	// small is up to which size a file is held in memory while it is stored beside others.
	small = 64 << 10
	// width is how many are.
	width = 32
)

// Archive stores the directory that is in a tar, which may be compressed by gzip, zstd or bzip2, or in
// a zip, and returns the digest of its root Directory. All of it is in the CAS then. Errors wrap
// ErrInvalid, ErrTooLarge, ErrNoDirectory, spool.ErrFull, or come from the store.
func Archive(ctx context.Context, cfg Config, archive *spool.File) (digest.Digest, error) {
	cfg.Limits = cfg.Limits.withDefaults()
	wanted, err := split(cfg.Directory, cfg.Limits)
	if err != nil {
		return digest.Digest{}, err
	}
	group, bound := errgroup.WithContext(ctx)
	group.SetLimit(width)
	u := &unpacker{ctx: bound, cfg: cfg, tree: newTree(cfg.Limits), puts: group, left: cfg.Limits.Bytes}
	err = u.read(archive)
	if err = errors.Join(group.Wait(), err); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return digest.Digest{}, err
	}
	root := u.tree.find(wanted)
	if root == nil || root.children == nil {
		return digest.Digest{}, fmt.Errorf("%w: %s", ErrNoDirectory, digest.Quote(cfg.Directory))
	}
	return u.store(ctx, root)
}

// unpacker reads one archive.
type unpacker struct {
	ctx  context.Context //nolint:containedctx // it lives as long as one call of Archive
	cfg  Config
	tree *tree
	puts *errgroup.Group
	left int64 // bytes that may still be unpacked
}

// file stores the content of a file and returns its node. Content of more than size bytes is an error.
func (u *unpacker) file(name string, content io.Reader, size int64, executable bool) (*node, error) {
	if size < 0 || size > u.left {
		return nil, fmt.Errorf("%w: it has more than %d bytes unpacked", ErrTooLarge, u.cfg.Limits.Bytes)
	}
	content = io.LimitReader(content, size+1)
	var d digest.Digest
	var n int64
	var err error
	if size <= small {
		d, n, err = u.smallFile(content)
	} else {
		d, n, err = u.largeFile(content)
	}
	u.left -= n
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", digest.Quote(name), err)
	case n != size:
		return nil, fmt.Errorf("%w: %s has %d bytes or more, its entry says %d", ErrInvalid, digest.Quote(name), n, size)
	}
	return &node{file: &repb.FileNode{Digest: d.Proto(), IsExecutable: executable}}, nil
}

func (u *unpacker) smallFile(content io.Reader) (digest.Digest, int64, error) {
	data, err := io.ReadAll(content)
	if err != nil {
		return digest.Digest{}, int64(len(data)), err
	}
	d := u.cfg.Space.Of(data)
	u.put(d, data)
	return d, d.Size(), nil
}

// put stores bytes beside others.
func (u *unpacker) put(d digest.Digest, data []byte) {
	u.puts.Go(func() error { return u.cfg.Blobs.Put(u.ctx, d, bytes.NewReader(data)) })
}

func (u *unpacker) largeFile(content io.Reader) (digest.Digest, int64, error) {
	file := u.cfg.Spool.New()
	defer file.Close() //nolint:errcheck // it was read, or has failed already
	h := u.cfg.Space.Function().New()
	n, err := io.Copy(io.MultiWriter(file, h), content)
	if err != nil {
		return digest.Digest{}, n, err
	}
	d := u.cfg.Space.Sum(h, n)
	return d, n, u.cfg.Blobs.Put(u.ctx, d, file.Reader())
}

// store stores the Directory messages of a tree.
func (u *unpacker) store(ctx context.Context, root *node) (digest.Digest, error) {
	group, bound := errgroup.WithContext(ctx)
	group.SetLimit(width)
	u.ctx, u.puts = bound, group
	d, err := u.directory(root, 0)
	return d, errors.Join(group.Wait(), err)
}

// directory stores a Directory and those below it. Its depth is bounded by that of the tree.
func (u *unpacker) directory(n *node, depth int) (digest.Digest, error) {
	message := &repb.Directory{}
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		switch child := n.children[name]; {
		case child.file != nil:
			message.Files = append(message.Files, child.file)
		case child.children == nil:
			if !staysInside(child.target, depth) {
				return digest.Digest{}, fmt.Errorf("%w: the link %s may lead out of it, to %s", ErrInvalid, digest.Quote(name), digest.Quote(child.target))
			}
			message.Symlinks = append(message.Symlinks, &repb.SymlinkNode{Name: name, Target: child.target})
		default:
			d, err := u.directory(child, depth+1)
			if err != nil {
				return digest.Digest{}, err
			}
			message.Directories = append(message.Directories, &repb.DirectoryNode{Name: name, Digest: d.Proto()})
		}
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return digest.Digest{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	d := u.cfg.Space.Of(data)
	u.put(d, data)
	return d, nil
}
