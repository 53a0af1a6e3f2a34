package digest

import (
	"crypto/sha1" //nolint:gosec // Clients choose it, REAPI names it.
	"crypto/sha256"
	"crypto/sha512"
	"hash"
	"slices"
	"strconv"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/zeebo/blake3"
)

// Function is a digest function that this farm computes. Of the rest of REAPI's, MD5 and MURMUR3 give
// no protection against a forged blob, GITSHA1 needs the size before the content, and VSO is that of
// one build system.
type Function uint8

// The functions, with REAPI's numbers.
const (
	SHA256     = Function(repb.DigestFunction_SHA256)
	BLAKE3     = Function(repb.DigestFunction_BLAKE3)
	SHA1       = Function(repb.DigestFunction_SHA1)
	SHA384     = Function(repb.DigestFunction_SHA384)
	SHA512     = Function(repb.DigestFunction_SHA512)
	SHA256TREE = Function(repb.DigestFunction_SHA256TREE)
)

// Functions lists the supported functions, the default first.
func Functions() []Function {
	return []Function{SHA256, BLAKE3, SHA1, SHA384, SHA512, SHA256TREE}
}

// MaxHexLen is the length of the longest hash of any function, in hex digits.
const MaxHexLen = 2 * sha512.Size

func (f Function) supported() bool { return slices.Contains(Functions(), f) }

// explicit functions are never inferred and have a segment in resource names; the others must not have
// one (rows GEN-13, GEN-18).
func (f Function) explicit() bool { return f == BLAKE3 || f == SHA256TREE }

// Proto returns the function as REAPI's enum.
func (f Function) Proto() repb.DigestFunction_Value { return repb.DigestFunction_Value(f) }

// String returns the lower-case name of the function.
func (f Function) String() string {
	switch f {
	case SHA256:
		return "sha256"
	case BLAKE3:
		return "blake3"
	case SHA1:
		return "sha1"
	case SHA384:
		return "sha384"
	case SHA512:
		return "sha512"
	case SHA256TREE:
		return "sha256tree"
	default:
		return "function-" + strconv.Itoa(int(f))
	}
}

// HexLen is the length of a hash of this function in hex digits, from 40 to MaxHexLen.
func (f Function) HexLen() int {
	switch f {
	case SHA1:
		return 2 * sha1.Size
	case SHA384:
		return 2 * sha512.Size384
	case SHA512:
		return 2 * sha512.Size
	default:
		return 2 * sha256.Size
	}
}

// Empty is the hash of zero bytes.
func (f Function) Empty() string {
	switch f {
	case BLAKE3:
		return "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
	case SHA1:
		return "da39a3ee5e6b4b0d3255bfef95601890afd80709"
	case SHA384:
		return "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"
	case SHA512:
		return "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce" +
			"47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e"
	default:
		return "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	}
}

// New returns a fresh hasher.
func (f Function) New() hash.Hash {
	switch f {
	case BLAKE3:
		return blake3.New()
	case SHA1:
		return sha1.New() //nolint:gosec // See the import.
	case SHA384:
		return sha512.New384()
	case SHA512:
		return sha512.New()
	case SHA256TREE:
		return newTree()
	default:
		return sha256.New()
	}
}

// component is the segment of resource names with its slash, empty where it must be left out.
func (f Function) component() string {
	if !f.explicit() {
		return ""
	}
	return f.String() + "/"
}

// inferred is the function whose hashes have this many digits and which a client need not name, or 0
// (row GEN-12).
func inferred(digits int) Function {
	for _, f := range Functions() {
		if f.HexLen() == digits && !f.explicit() {
			return f
		}
	}
	return 0
}

// functionNamed is the function with this lower-case name, or 0.
func functionNamed(name string) Function {
	for _, f := range Functions() {
		if f.String() == name {
			return f
		}
	}
	return 0
}

// supported lists the functions for error texts.
func supported() string {
	var names []string
	for _, f := range Functions() {
		names = append(names, f.String())
	}
	return "supported digest functions: " + strings.Join(names, ", ")
}
