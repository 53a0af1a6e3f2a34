package digest

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"hash"
)

// leafSize is the size of the pieces of a blob that SHA256TREE hashes with plain SHA-256.
const leafSize = 1024

// tree computes REAPI's SHA256TREE (DigestFunction.SHA256TREE in its proto): a binary tree over
// leaves of 1 KiB, whose left sides have a power of two of them. It keeps one hash for each level
// that waits for its right side, 2 KiB for the largest blob there can be.
//
// The inner nodes are one run of SHA-256's block function from another state and without the addition
// at its end. The standard library has that function, in the machine's instructions, behind the
// saved form of a hash: setting a state, hashing one block and taking the state is the block function
// with the addition, which is undone here. The rejected alternative is the block function once more in
// Go, several times slower.
type tree struct {
	leaf   hash.Hash // of the last leaf
	inLeaf int       // bytes in it, 0 only before the first byte
	leaves uint64    // before it
	left   [][sha256.Size]byte

	node  saver
	start []byte // the saved form of node under which two hashes become one
	saved []byte // scratch, as is sum
	sum   [sha256.Size]byte
}

// saver is a SHA-256 as the standard library has it.
type saver interface {
	hash.Hash
	encoding.BinaryAppender
	encoding.BinaryUnmarshaler
}

// stateAt is where the saved form of a SHA-256 has its eight words, after four bytes of magic.
const stateAt = 4

func newTree() *tree {
	node, ok := sha256.New().(saver)
	if !ok {
		panic("a SHA-256 cannot be saved")
	}
	t := &tree{leaf: sha256.New(), node: node}
	t.start = t.save(nil)
	// The first eight words of SHA-384, from the square roots of the 9th to the 16th prime.
	for i, word := range [...]uint32{
		0xcbbb9d5d, 0x629a292a, 0x9159015a, 0x152fecd8, 0x67332667, 0x8eb44a87, 0xdb0c2e0d, 0x47b5481d,
	} {
		binary.BigEndian.PutUint32(t.start[stateAt+4*i:], word)
	}
	return t
}

func (t *tree) Size() int      { return sha256.Size }
func (t *tree) BlockSize() int { return leafSize }

func (t *tree) Reset() {
	t.leaf.Reset()
	t.inLeaf, t.leaves, t.left = 0, 0, t.left[:0]
}

// Write never fails. A full leaf waits for the byte after it, since the last one is merged in Sum.
func (t *tree) Write(p []byte) (int, error) {
	written := len(p)
	for len(p) > 0 {
		if t.inLeaf == leafSize {
			t.push()
		}
		n := min(len(p), leafSize-t.inLeaf)
		t.leaf.Write(p[:n])
		t.inLeaf += n
		p = p[n:]
	}
	return written, nil
}

// push ends a leaf that is not the last one and merges the subtrees that it completes.
func (t *tree) push() {
	t.leaf.Sum(t.sum[:0])
	t.leaf.Reset()
	t.inLeaf = 0
	t.leaves++
	for n := t.leaves; n&1 == 0; n >>= 1 {
		last := len(t.left) - 1
		t.merge(&t.left[last])
		t.left = t.left[:last]
	}
	t.left = append(t.left, t.sum)
}

// Sum appends the hash of what was written so far.
func (t *tree) Sum(b []byte) []byte {
	t.leaf.Sum(t.sum[:0])
	for i := len(t.left) - 1; i >= 0; i-- {
		t.merge(&t.left[i])
	}
	return append(b, t.sum[:]...)
}

// merge replaces t.sum by the hash of the inner node of left and t.sum.
func (t *tree) merge(left *[sha256.Size]byte) {
	if err := t.node.UnmarshalBinary(t.start); err != nil {
		panic("a SHA-256 does not take its own saved form: " + err.Error())
	}
	t.node.Write(left[:])
	t.node.Write(t.sum[:])
	t.saved = t.save(t.saved[:0])
	for i := stateAt; i < stateAt+sha256.Size; i += 4 {
		word := binary.BigEndian.Uint32(t.saved[i:]) - binary.BigEndian.Uint32(t.start[i:])
		binary.BigEndian.PutUint32(t.sum[i-stateAt:], word)
	}
}

func (t *tree) save(b []byte) []byte {
	b, err := t.node.AppendBinary(b)
	if err != nil {
		panic("a SHA-256 cannot be saved: " + err.Error())
	}
	return b
}
