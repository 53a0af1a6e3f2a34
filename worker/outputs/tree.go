package outputs

import (
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// encoder turns a directory into its distinct Directory messages.
type encoder struct {
	space digest.Space
	known map[digest.Digest]bool
	// dirs are the distinct directories in the order in which they were completed: every one follows
	// all that it refers to.
	dirs []encoded
}

type encoded struct {
	digest digest.Digest
	data   []byte
}

// encode returns the digest of a directory all of whose files are hashed.
func (e *encoder) encode(n *node) (digest.Digest, error) {
	m := &repb.Directory{}
	for _, c := range n.children {
		switch c.kind {
		case unix.S_IFREG:
			m.Files = append(m.Files, &repb.FileNode{Name: c.name, Digest: c.digest.Proto(), IsExecutable: c.executable})
		case unix.S_IFLNK:
			m.Symlinks = append(m.Symlinks, &repb.SymlinkNode{Name: c.name, Target: c.target})
		case unix.S_IFDIR:
			d, err := e.encode(c)
			if err != nil {
				return digest.Digest{}, err
			}
			m.Directories = append(m.Directories, &repb.DirectoryNode{Name: c.name, Digest: d.Proto()})
		}
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return digest.Digest{}, err
	}
	d := e.space.Of(data)
	if !e.known[d] {
		e.known[d] = true
		e.dirs = append(e.dirs, encoded{digest: d, data: data})
	}
	return d, nil
}

// tree returns the bytes of the Tree message: the root and then every other directory once, parents
// before children, which is what is_topologically_sorted promises (row EXO-12).
func (e *encoder) tree() []byte {
	size := 0
	for _, dir := range e.dirs {
		size += 1 + protowire.SizeBytes(len(dir.data))
	}
	b := make([]byte, 0, size)
	field := protowire.Number(1)
	for _, dir := range slices.Backward(e.dirs) {
		b = protowire.AppendTag(b, field, protowire.BytesType)
		b = protowire.AppendBytes(b, dir.data)
		field = 2
	}
	return b
}
