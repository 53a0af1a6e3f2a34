package upstream_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// gate is a store whose readers stop after some bytes until the gate is opened, and that counts what is
// asked of it. It hides the optional interfaces of the store.
type gate struct {
	cas.Store
	after   int // how many bytes pass a closed gate
	opened  chan struct{}
	once    sync.Once
	opens   atomic.Int64 // Opens of blobs that are there
	reading atomic.Int64 // readers that are not closed
	asked   atomic.Int64 // calls of Missing
}

func newGate(s cas.Store, after int) *gate {
	return &gate{Store: s, after: after, opened: make(chan struct{})}
}

func (g *gate) open() { g.once.Do(func() { close(g.opened) }) }

func (g *gate) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	g.asked.Add(1)
	return g.Store.Missing(ctx, ds)
}

func (g *gate) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := g.Store.Open(ctx, d, offset)
	if err != nil {
		return nil, err
	}
	g.opens.Add(1)
	g.reading.Add(1)
	return &gated{ReadCloser: r, gate: g, left: g.after, done: ctx.Done(), cause: func() error { return context.Cause(ctx) }}, nil
}

type gated struct {
	io.ReadCloser
	gate  *gate
	left  int
	done  <-chan struct{}
	cause func() error
}

func (r *gated) Read(p []byte) (int, error) {
	if r.left > 0 {
		n, err := r.ReadCloser.Read(p[:min(len(p), r.left)])
		r.left -= n
		return n, err
	}
	select {
	case <-r.gate.opened:
		return r.ReadCloser.Read(p)
	case <-r.done:
		return 0, r.cause()
	}
}

func (r *gated) Close() error {
	r.gate.reading.Add(-1)
	return r.ReadCloser.Close()
}

var errStop = errors.New("the test ended this context")
