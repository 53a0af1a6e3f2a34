package castest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Resumable is a Memory that is a cas.Resumer and keeps every byte that an upload brought, for ever.
type Resumable struct {
	*Memory
	mu   sync.Mutex // guards kept
	kept map[part][]byte
}

// part names an upload.
type part struct {
	digest digest.Digest
	upload string
}

var _ cas.Resumer = (*Resumable)(nil)

// NewResumable returns a store that holds nothing.
func NewResumable() *Resumable {
	return &Resumable{Memory: NewMemory(), kept: make(map[part][]byte)}
}

// Committed implements cas.Resumer.
func (m *Resumable) Committed(ctx context.Context, d digest.Digest, upload string) (int64, error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return int64(len(m.of(part{d, upload}))), nil
}

// PutFrom implements cas.Resumer.
func (m *Resumable) PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if _, ok := m.get(d); ok {
		return nil
	}
	p := part{d, upload}
	kept := m.of(p)
	if offset > int64(len(kept)) {
		return fmt.Errorf("%w: %v from %d on", cas.ErrNotKept, d, offset)
	}
	var brought bytes.Buffer
	brought.Write(kept[:offset])
	seen := io.TeeReader(r, &brought)
	err := m.Put(ctx, d, io.MultiReader(bytes.NewReader(kept[:offset]), seen))
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil || errors.Is(err, cas.ErrMismatch) {
		delete(m.kept, p)
	} else {
		m.kept[p] = brought.Bytes()
	}
	return err
}

func (m *Resumable) of(p part) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.kept[p]
}
