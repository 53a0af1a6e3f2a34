package cas

import (
	"context"
	"fmt"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// Sizer is a Store that can find a blob by its hash alone, as the HTTP cache protocol and checksums
// of downloads name blobs.
type Sizer interface {
	// Size returns the size of the blob of this hash. The error wraps ErrNotFound when the store does
	// not know it; as with Missing, a blob that was just stored elsewhere may not be known yet. The
	// answer says nothing of how long the blob stays: who needs it asks Missing about the digest.
	Size(ctx context.Context, space digest.Space, hash string) (int64, error)
}

// Find returns the digest of the blob that has a hash in a space. The error wraps ErrNotFound, also
// when the store is no Sizer, and digest.ErrInvalid for what is no hash of the space.
func Find(ctx context.Context, s Store, space digest.Space, hash string) (digest.Digest, error) {
	empty, err := space.New(hash, 0)
	if err != nil {
		return digest.Digest{}, err
	}
	if empty.IsEmpty() {
		return empty, nil
	}
	sizer, ok := s.(Sizer)
	if !ok {
		return digest.Digest{}, fmt.Errorf("%w: this store finds none by its hash %s", ErrNotFound, hash)
	}
	size, err := sizer.Size(ctx, space, hash)
	if err != nil {
		return digest.Digest{}, err
	}
	return space.New(hash, size)
}
