package cas

import (
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Verifier computes whether the bytes that are written to it have a digest. It needs no Close.
type Verifier struct {
	digest digest.Digest
	hash   hash.Hash // nil when only the size counts
	size   int64
}

// NewVerifier returns a Verifier that has seen no bytes.
func NewVerifier(d digest.Digest) *Verifier {
	return &Verifier{digest: d, hash: d.Space().Function().New()}
}

// NewLengthVerifier returns a Verifier that looks at the size alone, for bytes whose hash is somebody
// else's to check.
func NewLengthVerifier(d digest.Digest) *Verifier { return &Verifier{digest: d} }

// Write takes the next bytes of the blob. When the blob grows past its size the error wraps
// ErrMismatch, so that an endless source is cut off at once.
func (v *Verifier) Write(p []byte) (int, error) {
	if left := v.digest.Size() - v.size; int64(len(p)) > left {
		v.size += int64(len(p)) // Verdict must keep failing.
		return 0, fmt.Errorf("%w: %v continues after %d bytes", ErrMismatch, v.digest, v.digest.Size())
	}
	v.size += int64(len(p))
	if v.hash == nil {
		return len(p), nil
	}
	return v.hash.Write(p)
}

// Hashes tells whether Verdict compares the hash.
func (v *Verifier) Hashes() bool { return v.hash != nil }

// Digest is the one that is expected.
func (v *Verifier) Digest() digest.Digest { return v.digest }

// Size is the number of bytes written.
func (v *Verifier) Size() int64 { return v.size }

// Verdict tells whether what was written is the whole blob. If not, the error wraps ErrMismatch.
func (v *Verifier) Verdict() error {
	if v.size != v.digest.Size() {
		return fmt.Errorf("%w: %v ended after %d bytes", ErrMismatch, v.digest, v.size)
	}
	if v.hash == nil {
		return nil
	}
	if got := v.digest.Space().Sum(v.hash, v.size); got != v.digest {
		return fmt.Errorf("%w: the bytes of %v have the hash %s", ErrMismatch, v.digest, got.Hash())
	}
	return nil
}

// Verify returns a reader of r that ends with io.EOF only if the bytes of r are exactly those of
// d, else with an error that wraps ErrMismatch. Other errors of r come through as they are. It
// reads at most one byte more than d has.
func Verify(r io.Reader, d digest.Digest) io.Reader {
	return &verifyReader{source: r, seen: NewVerifier(d)}
}

// VerifyCloser is Verify for a reader that has to be closed.
func VerifyCloser(r io.ReadCloser, d digest.Digest) io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{Verify(r, d), r}
}

type verifyReader struct {
	source io.Reader
	seen   *Verifier
	err    error // sticky
}

func (r *verifyReader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if left := r.seen.digest.Size() - r.seen.size; int64(len(p)) > left+1 {
		p = p[:left+1]
	}
	n, err := r.source.Read(p)
	if n > 0 {
		if _, bad := r.seen.Write(p[:n]); bad != nil {
			r.err = bad
			return 0, bad
		}
	}
	if errors.Is(err, io.EOF) {
		if bad := r.seen.Verdict(); bad != nil {
			err = bad
		}
	}
	r.err = err
	return n, err
}
