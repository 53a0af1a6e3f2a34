package objectstore

import (
	"context"
	"fmt"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

var _ cas.Sizer = (*Store)(nil)

// Size tells the size of a blob from the index, see cas.Sizer. The broker is not asked, since a stream
// finds nothing by hash alone without a scan.
func (s *Store) Size(ctx context.Context, space digest.Space, hash string) (int64, error) {
	if ctx.Err() != nil {
		return 0, ended(ctx)
	}
	d, err := space.New(hash, 0)
	if err != nil {
		return 0, err
	}
	e, _ := s.index.get(keyOf(d), 0)
	if e.size() == 0 {
		return 0, fmt.Errorf("%w: none has the hash %s", cas.ErrNotFound, hash)
	}
	return e.size(), nil
}
