package actioncache

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// What the output directories of one result may have before it is not checked any more (row
// ACG-16). A Tree is read as a stream, so that only one Directory is in memory at a time.
const (
	maxNodes     = 1_000_000
	maxBytes     = 256 << 20
	maxDirectory = 16 << 20
)

// ErrTooLarge reports a result whose output directories cannot be checked within bounds.
var ErrTooLarge = errors.New("output directories have too many entries")

// directory adds what an output directory names: its Tree, the files in that and, when the
// directory is also given by its root, the Directory blobs (rows ACG-2, EXO-13).
func (n *named) directory(ctx context.Context, out *repb.OutputDirectory) error {
	if out.GetTreeDigest() == nil && out.GetRootDirectoryDigest() == nil {
		return fmt.Errorf("%w: output directory %s has no digest", ErrInvalid, digest.Quote(out.GetPath()))
	}
	var root digest.Digest
	if m := out.GetRootDirectoryDigest(); m != nil {
		var err error
		if root, err = n.space.Parse(m); err != nil {
			return fmt.Errorf("%w: root of output directory %s: %w", ErrInvalid, digest.Quote(out.GetPath()), err)
		}
	}
	if m := out.GetTreeDigest(); m != nil {
		tree, err := n.space.Parse(m)
		if err != nil {
			return fmt.Errorf("%w: output directory %s: %w", ErrInvalid, digest.Quote(out.GetPath()), err)
		}
		held, err := n.tree(ctx, tree, root)
		if err != nil {
			return fmt.Errorf("output directory %s: %w", digest.Quote(out.GetPath()), err)
		}
		if held {
			return nil
		}
	}
	if root.IsZero() {
		return nil
	}
	if err := n.hierarchy(ctx, root); err != nil {
		return fmt.Errorf("output directory %s: %w", digest.Quote(out.GetPath()), err)
	}
	return nil
}

// tree adds a Tree and the files in it. When root is set, the Directories of the tree are added as
// well, and hasRoot tells whether root is the digest of one of them, which makes them the hierarchy
// below root.
func (n *named) tree(ctx context.Context, d, root digest.Digest) (hasRoot bool, err error) {
	if err := n.grow(0, d.Size()); err != nil {
		return false, err
	}
	err = n.stream(ctx, d, func(encoded []byte) error {
		if !root.IsZero() {
			own := n.space.Of(encoded)
			hasRoot = hasRoot || own == root
			if err := n.addDigest(ctx, own); err != nil {
				return err
			}
		}
		_, err := n.files(ctx, encoded)
		return err
	})
	if lost(err) {
		n.missing = append(n.missing, d)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return hasRoot, n.addDigest(ctx, d) // The question is what extends its life (row ACG-3).
}

// stream calls visit with each serialized Directory of a Tree. The error wraps ErrInvalid only when
// the bytes are those of the digest.
func (n *named) stream(ctx context.Context, d digest.Digest, visit func(encoded []byte) error) error {
	r, err := n.blobs.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	verified := cas.Verify(r, d)
	err = directories(verified, visit)
	if errors.Is(err, ErrInvalid) {
		if _, bad := io.Copy(io.Discard, verified); bad != nil {
			err = bad
		}
	}
	return errors.Join(err, r.Close())
}

// hierarchy adds the Directory blobs that can be reached from root and the files in them.
func (n *named) hierarchy(ctx context.Context, root digest.Digest) error {
	todo, seen := []digest.Digest{root}, map[digest.Digest]bool{root: true}
	for len(todo) > 0 {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if err := n.grow(0, d.Size()); err != nil {
			return err
		}
		if d.Size() > maxDirectory {
			return fmt.Errorf("%w: a Directory of %d bytes", ErrTooLarge, d.Size())
		}
		encoded, err := cas.ReadAll(ctx, n.blobs, d, maxDirectory)
		if lost(err) {
			n.missing = append(n.missing, d)
			continue
		}
		if err != nil {
			return err
		}
		dir, err := n.files(ctx, encoded)
		if err = errors.Join(err, n.addDigest(ctx, d)); err != nil {
			return err
		}
		for _, child := range dir.GetDirectories() {
			c, err := n.space.Parse(child.GetDigest())
			if err != nil {
				return fmt.Errorf("%w: directory %s: %w", ErrInvalid, digest.Quote(child.GetName()), err)
			}
			if !seen[c] {
				seen[c] = true
				todo = append(todo, c)
			}
		}
	}
	return nil
}

// files adds the files of a serialized Directory.
func (n *named) files(ctx context.Context, encoded []byte) (*repb.Directory, error) {
	// An entry of two bytes takes a hundred in memory: they are counted before.
	if err := n.grow(1+fields(encoded), 0); err != nil {
		return nil, err
	}
	dir := new(repb.Directory)
	if err := proto.Unmarshal(encoded, dir); err != nil {
		return nil, fmt.Errorf("%w: a Directory: %w", ErrInvalid, err)
	}
	for _, f := range dir.GetFiles() {
		if err := n.add(ctx, f.GetDigest(), "file", f.GetName()); err != nil {
			return nil, err
		}
	}
	return dir, nil
}

// fields returns how many fields a serialized message has, as far as it can be read.
func fields(encoded []byte) (count int) {
	for len(encoded) > 0 {
		_, _, size := protowire.ConsumeField(encoded)
		if size < 0 {
			break
		}
		encoded = encoded[size:]
		count++
	}
	return count
}

func (n *named) grow(nodes int, size int64) error {
	n.nodes += nodes
	if size > maxBytes || n.nodes > maxNodes {
		return ErrTooLarge
	}
	if n.bytes += size; n.bytes > maxBytes {
		return ErrTooLarge
	}
	return nil
}

// directories calls visit with each serialized Directory of a serialized Tree. The bytes are valid
// during the call only. It reads r to its end, where the verdict on the digest comes. What is not a
// Tree is ErrInvalid.
func directories(r io.Reader, visit func(encoded []byte) error) error {
	in := bufio.NewReaderSize(r, 64<<10)
	var buffer []byte
	for {
		if _, err := in.Peek(1); errors.Is(err, io.EOF) {
			return nil
		}
		field, kind, size, err := next(in)
		if err != nil {
			return err
		}
		if kind != protowire.BytesType || (field != 1 && field != 2) { // not root or children
			if _, err := io.CopyN(io.Discard, in, size); err != nil {
				return cutOff(err)
			}
			continue
		}
		if size > maxDirectory {
			return fmt.Errorf("%w: a Directory of %d bytes", ErrTooLarge, size)
		}
		buffer = slices.Grow(buffer[:0], int(size))[:size]
		if _, err := io.ReadFull(in, buffer); err != nil {
			return cutOff(err)
		}
		if err := visit(buffer); err != nil {
			return err
		}
	}
}

// next reads what comes before the bytes of a field, and how many they are.
func next(in *bufio.Reader) (protowire.Number, protowire.Type, int64, error) {
	tag, err := uvarint(in)
	if err != nil {
		return 0, 0, 0, err
	}
	field, kind := protowire.DecodeTag(tag)
	var size uint64
	switch kind {
	case protowire.BytesType:
		size, err = uvarint(in)
	case protowire.VarintType:
		_, err = uvarint(in)
	case protowire.Fixed32Type:
		size = 4
	case protowire.Fixed64Type:
		size = 8
	default:
		err = fmt.Errorf("%w: a Tree has wire type %d", ErrInvalid, kind)
	}
	if size > maxBytes {
		err = fmt.Errorf("%w: a Tree has a field of %d bytes", ErrInvalid, size)
	}
	return field, kind, int64(size), err
}

func uvarint(in *bufio.Reader) (uint64, error) {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		b, err := in.ReadByte()
		if err != nil {
			return 0, cutOff(err)
		}
		if v |= uint64(b&0x7f) << shift; b < 0x80 {
			return v, nil
		}
	}
	return 0, fmt.Errorf("%w: a Tree has an endless number", ErrInvalid)
}

// cutOff tells a Tree that ends too early from a read that failed.
func cutOff(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: a Tree is cut off", ErrInvalid)
	}
	return err
}
