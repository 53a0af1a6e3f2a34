package castest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Memory is a cas.Store in memory without any bound, for tests.
type Memory struct {
	mu    sync.Mutex // guards blobs
	blobs map[digest.Digest][]byte
}

var (
	_ cas.Store = (*Memory)(nil)
	_ cas.Sizer = (*Memory)(nil)
)

// NewMemory returns a store that holds nothing.
func NewMemory() *Memory { return &Memory{blobs: make(map[digest.Digest][]byte)} }

// Open implements cas.Store.
func (m *Memory) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	data, ok := m.get(d)
	if !ok {
		return nil, fmt.Errorf("%w: %v", cas.ErrNotFound, d)
	}
	var r io.Reader = bytes.NewReader(data[min(offset, int64(len(data))):])
	if offset == 0 {
		r = cas.Verify(r, d)
	}
	return io.NopCloser(bound(ctx, r)), nil
}

// Put implements cas.Store.
func (m *Memory) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if _, ok := m.get(d); ok {
		return nil
	}
	data, err := io.ReadAll(bound(ctx, cas.Verify(r, d)))
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blobs[d] = data
	return nil
}

// Missing implements cas.Store.
func (m *Memory) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var missing []digest.Digest
	seen := make(map[digest.Digest]bool)
	for _, d := range ds {
		if _, ok := m.get(d); !ok && !seen[d] {
			seen[d] = true
			missing = append(missing, d)
		}
	}
	return missing, nil
}

// Size implements cas.Sizer.
func (m *Memory) Size(ctx context.Context, space digest.Space, hash string) (int64, error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for d := range m.blobs {
		if d.Space() == space && d.Hash() == hash {
			return d.Size(), nil
		}
	}
	return 0, fmt.Errorf("%w: none has the hash %s", cas.ErrNotFound, hash)
}

// Remove makes a blob absent.
func (m *Memory) Remove(d digest.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.blobs, d)
}

// Corrupt replaces the bytes of a blob by others, which need not match.
func (m *Memory) Corrupt(d digest.Digest, data []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blobs[d] = bytes.Clone(data)
}

func (m *Memory) get(d digest.Digest) ([]byte, bool) {
	if d.IsEmpty() {
		return nil, true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.blobs[d]
	return data, ok && !d.IsImpossible()
}

// bound returns a reader of r that fails with the cause of ctx once that has ended.
func bound(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return r.Read(p)
	})
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
