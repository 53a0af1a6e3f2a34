package fetch

import (
	"crypto/sha1" //nolint:gosec // clients still publish it
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
)

// ErrChecksum reports content that has none of the expected checksums.
var ErrChecksum = errors.New("checksum does not match")

// maxChecksums bounds how many checksums one content is hashed for.
const maxChecksums = 16

// Checksums is a Subresource Integrity value: content is right when it has at least one of them.
type Checksums []Checksum

// Checksum is one hash of a Checksums value.
type Checksum struct {
	Algorithm string // sha256, sha384, sha512 or sha1
	Sum       []byte
}

func newHash(algorithm string) hash.Hash {
	switch algorithm {
	case "sha1":
		return sha1.New() //nolint:gosec // see above
	case "sha256":
		return sha256.New()
	case "sha384":
		return sha512.New384()
	case "sha512":
		return sha512.New()
	}
	return nil
}

// ParseChecksums parses `{algorithm}-{base64}`, several of them separated by spaces. Unknown algorithms
// are passed over as long as there is one that is known. Errors are texts about the value.
func ParseChecksums(text string) (Checksums, error) {
	var sums Checksums
	for word := range strings.FieldsSeq(text) {
		word, _, _ = strings.Cut(word, "?") // options, of which none is defined
		algorithm, encoded, ok := strings.Cut(word, "-")
		h := newHash(algorithm)
		if !ok {
			return nil, fmt.Errorf("%q is not ALGORITHM-BASE64", clip(word))
		}
		if h == nil {
			continue
		}
		sum, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil || len(sum) != h.Size() {
			return nil, fmt.Errorf("%q is not the base64 of %d bytes", clip(encoded), h.Size())
		}
		if sums = append(sums, Checksum{algorithm, sum}); len(sums) > maxChecksums {
			return nil, fmt.Errorf("there are more than %d checksums", maxChecksums)
		}
	}
	if len(sums) == 0 {
		return nil, errors.New("there is no sha256, sha384, sha512 or sha1 checksum in it")
	}
	return sums, nil
}

func clip(s string) string {
	const most = 128
	return s[:min(len(s), most)]
}

// Check computes checksums of what is written to it.
type Check struct {
	want   Checksums
	hashes map[string]hash.Hash
}

// Check returns a new computation.
func (c Checksums) Check() *Check {
	k := &Check{want: c, hashes: make(map[string]hash.Hash)}
	for _, sum := range c {
		if k.hashes[sum.Algorithm] == nil {
			k.hashes[sum.Algorithm] = newHash(sum.Algorithm)
		}
	}
	return k
}

var _ io.Writer = (*Check)(nil)

// Write implements io.Writer; it never fails.
func (k *Check) Write(p []byte) (int, error) {
	for _, h := range k.hashes {
		h.Write(p)
	}
	return len(p), nil
}

// Verdict returns nil when the content has one of the checksums or none was asked for. The error wraps
// ErrChecksum.
func (k *Check) Verdict() error {
	if len(k.want) == 0 {
		return nil
	}
	for _, sum := range k.want {
		if string(k.hashes[sum.Algorithm].Sum(nil)) == string(sum.Sum) {
			return nil
		}
	}
	first := k.want[0].Algorithm
	return fmt.Errorf("%w: the content has %s-%s", ErrChecksum, first, base64.StdEncoding.EncodeToString(k.hashes[first].Sum(nil)))
}
