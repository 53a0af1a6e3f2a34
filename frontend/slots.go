package frontend

import (
	"fmt"
	"sync/atomic"
)

// slots bounds how many of something there are at once. Nobody waits for one: a client that is told to
// come back holds nothing meanwhile.
type slots struct {
	what  string
	most  int64
	taken atomic.Int64
}

// take takes a slot, which the caller gives back with release, or returns an errBusy.
func (s *slots) take() error {
	if s.taken.Add(1) > s.most {
		s.taken.Add(-1)
		return fmt.Errorf("%w: it has %d %s, which is as many as it takes", errBusy, s.most, s.what)
	}
	return nil
}

func (s *slots) release() { s.taken.Add(-1) }
