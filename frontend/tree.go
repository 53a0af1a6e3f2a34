package frontend

import (
	"context"
	"errors"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// GetTree streams the directories below a root, breadth first and each once, in pages. Parts that
// are absent or no directories are left out (rows TREE-3, TREE-10, TREE-11).
func (c *content) GetTree(req *repb.GetTreeRequest, stream grpc.ServerStreamingServer[repb.GetTreeResponse]) error {
	space, err := spaceOf(req.GetInstanceName(), req.GetDigestFunction(), req.GetRootDigest())
	if err != nil {
		return err
	}
	root, err := space.Parse(req.GetRootDigest())
	if err != nil {
		return fmt.Errorf("root_digest: %w", err)
	}
	if req.GetPageSize() < 0 {
		return fmt.Errorf("%w: page_size %d is negative", errInvalid, req.GetPageSize())
	}
	pages := &treePages{stream: stream, root: root, perPage: int(req.GetPageSize()), maxBytes: c.limits.MaxResponseBytes}
	if token := req.GetPageToken(); token != "" {
		if pages.after, err = parseTreeToken(token, root); err != nil {
			return err
		}
	}
	walk := &treeWalk{blobs: c.blobs, limits: c.limits, root: root}
	if err := walk.run(stream.Context(), pages.add); err != nil {
		return err
	}
	return pages.end()
}

// treeWalk visits the directories below root in an order that depends on their content alone.
type treeWalk struct {
	blobs  cas.Store
	limits Limits
	root   digest.Digest

	queue []digest.Digest // found and not yet visited
	seen  map[digest.Digest]struct{}
	bytes int64
}

// treeDirectory is one visited digest; directory is nil when it is absent or not a directory.
type treeDirectory struct {
	digest    digest.Digest
	directory *repb.Directory
	// size is the number of bytes of the stored directory.
	size int
}

// treeAhead is how many directories are read at once.
const treeAhead = 32

// run calls visit for each directory. It holds the digests found, which MaxTreeDirectories bounds,
// and treeAhead directories.
func (w *treeWalk) run(ctx context.Context, visit func(treeDirectory) error) error {
	w.queue = []digest.Digest{w.root}
	w.seen = map[digest.Digest]struct{}{w.root: {}}
	for len(w.queue) > 0 {
		ahead := w.queue[:min(len(w.queue), treeAhead)]
		w.queue = w.queue[len(ahead):]
		found, err := w.read(ctx, ahead)
		if err != nil {
			return err
		}
		for _, directory := range found {
			if directory.directory == nil {
				continue
			}
			w.bytes += int64(directory.size)
			if w.bytes > w.limits.MaxTreeBytes {
				return fmt.Errorf("%w: the directories below %v have more than %d bytes", errTooLarge, w.root, w.limits.MaxTreeBytes)
			}
			if err := visit(directory); err != nil {
				return err
			}
			if err := w.descend(directory); err != nil {
				return err
			}
		}
	}
	return nil
}

// descend queues the children of a directory that were not seen before.
func (w *treeWalk) descend(parent treeDirectory) error {
	for _, node := range parent.directory.GetDirectories() {
		child, err := w.root.Space().Parse(node.GetDigest())
		if err != nil {
			continue // A part that cannot exist is a missing part.
		}
		if _, twice := w.seen[child]; twice {
			continue
		}
		if len(w.seen) >= w.limits.MaxTreeDirectories {
			return fmt.Errorf("%w: there are more than %d directories below %v", errTooLarge, w.limits.MaxTreeDirectories, w.root)
		}
		w.seen[child] = struct{}{}
		w.queue = append(w.queue, child)
	}
	return nil
}

// read reads directories concurrently and returns them in order.
func (w *treeWalk) read(ctx context.Context, ds []digest.Digest) ([]treeDirectory, error) {
	found := make([]treeDirectory, len(ds))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(min(treeAhead, w.limits.BatchConcurrency))
	for i, d := range ds {
		g.Go(func() error {
			var err error
			found[i], err = w.readOne(ctx, d)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return found, nil
}

func (w *treeWalk) readOne(ctx context.Context, d digest.Digest) (treeDirectory, error) {
	found := treeDirectory{digest: d, size: int(min(d.Size(), int64(w.limits.MaxResponseBytes)))}
	if d.Size() > int64(w.limits.MaxResponseBytes-treeOverhead) {
		missing, err := cas.Confirm(ctx, w.blobs, []digest.Digest{d})
		if err == nil && len(missing) == 0 {
			err = fmt.Errorf("%w: directory %v does not fit into a message of %d bytes", errTooLarge, d, w.limits.MaxResponseBytes)
		}
		if err == nil && d == w.root {
			err = fmt.Errorf("%w: %v", cas.ErrNotFound, d)
		}
		return found, err
	}
	b, err := readBlob(ctx, w.blobs, d, int64(w.limits.MaxResponseBytes))
	if err != nil {
		if d != w.root && (errors.Is(err, cas.ErrNotFound) || errors.Is(err, errDamaged)) {
			return found, nil
		}
		return found, err
	}
	directory := new(repb.Directory)
	if err := proto.Unmarshal(b, directory); err != nil {
		if d == w.root {
			return found, fmt.Errorf("%w: blob %v is not a Directory", errInvalid, d)
		}
		return found, nil
	}
	found.directory = directory
	return found, nil
}

// treeOverhead is what a response has besides its directories: the token and a length for each field.
const treeOverhead = 1 << 10

// treePages sends directories in messages of at most perPage of them and maxBytes. Each message but
// the last has the token that resumes after it.
type treePages struct {
	stream   grpc.ServerStreamingServer[repb.GetTreeResponse]
	root     digest.Digest
	perPage  int           // 0 is no limit
	maxBytes int           // of one message
	after    digest.Digest // the directory that a resumed call starts after; zero once passed
	page     []*repb.Directory
	bytes    int
	last     digest.Digest // the last directory on page
}

// add puts a directory on the page, after sending the page when it is full.
func (p *treePages) add(found treeDirectory) error {
	if !p.after.IsZero() {
		if found.digest == p.after {
			p.after = digest.Digest{}
		}
		return nil
	}
	const lengths = 1 + 4
	size := proto.Size(found.directory) + lengths
	if len(p.page) > 0 && (len(p.page) == p.perPage || p.bytes+size > p.maxBytes-treeOverhead) {
		if err := p.send(treeToken(p.root, p.last)); err != nil {
			return err
		}
	}
	p.page = append(p.page, found.directory)
	p.bytes += size
	p.last = found.digest
	return nil
}

// end sends the last page.
func (p *treePages) end() error {
	if !p.after.IsZero() {
		return fmt.Errorf("%w: page_token: directory %v is no longer below %v", errInvalid, p.after, p.root)
	}
	if len(p.page) == 0 {
		return nil
	}
	return p.send("")
}

func (p *treePages) send(token string) error {
	err := p.stream.Send(&repb.GetTreeResponse{Directories: p.page, NextPageToken: token})
	p.page, p.bytes = nil, 0
	return err
}
