package digest

import (
	"crypto/sha1" //nolint:gosec // Clients choose it, REAPI names it.
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
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

// traits is what this package knows of a function.
type traits struct {
	name   string
	digits int
	empty  string
	// explicit functions are never inferred and have a segment in resource names, the others must
	// not have one (rows GEN-13, GEN-18).
	explicit bool
}

// known has the traits of the functions by their numbers.
var known = [...]traits{
	SHA256:     trait(SHA256, false),
	BLAKE3:     trait(BLAKE3, true),
	SHA1:       trait(SHA1, false),
	SHA384:     trait(SHA384, false),
	SHA512:     trait(SHA512, false),
	SHA256TREE: trait(SHA256TREE, true),
}

func trait(f Function, explicit bool) traits {
	empty := hex.EncodeToString(f.New().Sum(nil))
	return traits{name: strings.ToLower(f.Proto().String()), digits: len(empty), empty: empty, explicit: explicit}
}

// supported lists the functions for error texts.
var supported = "supported digest functions: " + strings.Join(names(), ", ")

func names() []string {
	var out []string
	for _, f := range Functions() {
		out = append(out, f.String())
	}
	return out
}

func (f Function) supported() bool { return int(f) < len(known) && known[f].digits > 0 }

// traits are those of the default for a function that is none, which no valid Space has.
func (f Function) traits() *traits {
	if !f.supported() {
		return &known[SHA256]
	}
	return &known[f]
}

// Proto returns the function as REAPI's enum.
func (f Function) Proto() repb.DigestFunction_Value { return repb.DigestFunction_Value(f) }

// String returns the lower-case name of the function.
func (f Function) String() string {
	if !f.supported() {
		return "function-" + strconv.Itoa(int(f))
	}
	return known[f].name
}

// HexLen is the length of a hash of this function in hex digits, from 40 to MaxHexLen.
func (f Function) HexLen() int { return f.traits().digits }

// Empty is the hash of zero bytes.
func (f Function) Empty() string { return f.traits().empty }

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
	}
	return sha256.New()
}

// component is the segment of resource names with its slash, empty where it must be left out.
func (f Function) component() string {
	if !f.supported() || !known[f].explicit {
		return ""
	}
	return known[f].name + "/"
}

// inferred is the function whose hashes have this many digits and which a client need not name, or 0
// (row GEN-12).
func inferred(digits int) Function {
	for f := range known {
		if known[f].digits == digits && !known[f].explicit {
			return Function(f) //nolint:gosec // an index of known
		}
	}
	return 0
}

// functionNamed is the function with this lower-case name, or 0.
func functionNamed(name string) Function {
	i := slices.IndexFunc(known[:], func(t traits) bool { return t.digits > 0 && t.name == name })
	return Function(max(i, 0)) //nolint:gosec // an index of known
}
