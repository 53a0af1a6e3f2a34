package digest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strconv"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/zeebo/blake3"
)

// ErrInvalid reports a digest, instance name, digest function or resource name that is not well
// formed or not supported. The text names the value and what is wrong with it.
var ErrInvalid = errors.New("invalid digest")

// Space is a key space: blobs and action results of one space are invisible in every other.
// The zero Space is not valid; SpaceOf makes one.
type Space struct {
	instance string
	function Function
}

// SpaceOf returns the space of an instance name and a digest function. A function of UNKNOWN is
// inferred from the length of hash, or the default when that is empty, as REAPI's digest_function
// fields ask (checklist rows GEN-12 to GEN-15). The error wraps ErrInvalid.
func SpaceOf(instance string, fn repb.DigestFunction_Value, hash string) (Space, error) {
	if err := checkInstance(instance); err != nil {
		return Space{}, err
	}
	f := SHA256
	switch {
	case fn != repb.DigestFunction_UNKNOWN:
		f = Function(fn) //nolint:gosec // A value that does not fit is refused by the comparison.
		if !f.supported() || f.Proto() != fn {
			return Space{}, fmt.Errorf("%w: digest function %v is not supported (%s)", ErrInvalid, fn, supported())
		}
	case hash != "":
		if f = inferred(len(hash)); f == 0 {
			return Space{}, fmt.Errorf("%w: hash %s has %d digits, no digest function that may be left unnamed has (%s)",
				ErrInvalid, Quote(hash), len(hash), supported())
		}
	}
	return Space{instance: instance, function: f}, nil
}

// Instance is REAPI's instance name, which may be empty and may contain slashes.
func (s Space) Instance() string { return s.instance }

// Function is the digest function of every digest in the space.
func (s Space) Function() Function { return s.function }

// Parse turns REAPI's message into a Digest. A nil message, a hash that is not lower-case hex of
// the function's length and a negative size are ErrInvalid (rows GEN-8, GEN-10, GEN-11).
func (s Space) Parse(d *repb.Digest) (Digest, error) {
	if d == nil {
		return Digest{}, fmt.Errorf("%w: the digest is missing", ErrInvalid)
	}
	return s.New(d.GetHash(), d.GetSizeBytes())
}

// New returns the digest of a hash and a size. The error wraps ErrInvalid.
func (s Space) New(hash string, size int64) (Digest, error) {
	if len(hash) != s.function.HexLen() || hash == "" {
		return Digest{}, fmt.Errorf("%w: hash %s has %d digits, %v has %d", ErrInvalid, Quote(hash), len(hash), s.function, s.function.HexLen())
	}
	for i := range len(hash) {
		if c := hash[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return Digest{}, fmt.Errorf("%w: hash %s is not lower-case hex", ErrInvalid, Quote(hash))
		}
	}
	if size < 0 {
		return Digest{}, fmt.Errorf("%w: size %d of %s is negative", ErrInvalid, size, hash)
	}
	return Digest{space: s, hash: hash, size: size}, nil
}

// Of returns the digest of data.
func (s Space) Of(data []byte) Digest {
	switch s.function {
	case SHA256:
		sum := sha256.Sum256(data)
		return Digest{space: s, hash: hex.EncodeToString(sum[:]), size: int64(len(data))}
	case BLAKE3: // Its hasher is large.
		sum := blake3.Sum256(data)
		return Digest{space: s, hash: hex.EncodeToString(sum[:]), size: int64(len(data))}
	default:
		h := s.function.New()
		h.Write(data)
		return s.Sum(h, int64(len(data)))
	}
}

// Sum returns the digest of what has been written to h, a hasher of this space's function, which
// were size bytes.
func (s Space) Sum(h hash.Hash, size int64) Digest {
	return Digest{space: s, hash: hex.EncodeToString(h.Sum(nil)), size: size}
}

// Digest names a blob. It is comparable, so it serves as a map key. Only this package makes one.
type Digest struct {
	space Space
	hash  string
	size  int64
}

// Space is the key space that the blob lives in.
func (d Digest) Space() Space { return d.space }

// Hash is the hash in lower-case hex.
func (d Digest) Hash() string { return d.hash }

// Size is the number of bytes of the uncompressed blob.
func (d Digest) Size() int64 { return d.size }

// IsZero tells a Digest that names nothing.
func (d Digest) IsZero() bool { return d.hash == "" }

// IsEmpty tells the empty blob, which is always present and never stored (row GEN-20). A size of
// zero with another hash, or the empty hash with another size, is not it (row GEN-21).
func (d Digest) IsEmpty() bool { return d.size == 0 && d.hash == d.space.function.Empty() }

// IsImpossible tells a digest that no blob can have: size zero or the empty hash, but not both.
func (d Digest) IsImpossible() bool {
	return (d.size == 0) != (d.hash == d.space.function.Empty())
}

// Proto returns REAPI's message.
func (d Digest) Proto() *repb.Digest { return &repb.Digest{Hash: d.hash, SizeBytes: d.size} }

// String returns the ByteStream read name of the blob, which ParseRead accepts.
func (d Digest) String() string { return Read{Digest: d}.String() }

// Blob returns the name without the instance, the subject of a MISSING violation (row EXA-8).
func (d Digest) Blob() string { return "blobs/" + d.path() }

// path is the part of a resource name that says which blob.
func (d Digest) path() string {
	return d.space.function.component() + d.hash + "/" + strconv.FormatInt(d.size, 10)
}

func (s Space) prefix() string {
	if s.instance == "" {
		return ""
	}
	return s.instance + "/"
}

// Quote renders a value that a client sent for an error text: quoted, valid UTF-8 and cut to 256
// bytes (rows GEN-29, GEN-30).
func Quote(v string) string {
	const limit = 256
	if len(v) > limit {
		return strconv.Quote(v[:limit]) + "..."
	}
	return strconv.Quote(v)
}
