package inputs

import (
	"errors"
	"fmt"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// ErrInvalid reports an input root that a client must change. The text names the directory's digest
// and what is wrong with it.
var ErrInvalid = errors.New("invalid input root")

// MissingError lists blobs that are not in the storage, each once, in no more than MaxMissing entries.
type MissingError struct {
	Missing []digest.Digest
}

// MaxMissing bounds a MissingError.
const MaxMissing = 10_000

func (e *MissingError) Error() string {
	return fmt.Sprintf("%d blobs are missing, the first is %v", len(e.Missing), e.Missing[0])
}

// Missing returns a MissingError of distinct digests of ds, or nil when there are none.
func Missing(ds []digest.Digest) error {
	seen := make(map[digest.Digest]bool, len(ds))
	var distinct []digest.Digest
	for _, d := range ds {
		if !seen[d] && len(distinct) < MaxMissing {
			seen[d] = true
			distinct = append(distinct, d)
		}
	}
	if len(distinct) == 0 {
		return nil
	}
	return &MissingError{Missing: distinct}
}
