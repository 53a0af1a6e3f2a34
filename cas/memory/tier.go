package memory

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/pack"
)

// MaxBlob is the size of the largest blob that is held. Larger ones are read from files about as fast,
// and there would be few of them.
const MaxBlob = pack.MaxBlob

// Config is what New needs.
type Config struct {
	// MaxBytes bounds the blobs that are held, with what it takes to hold them. 0 holds none, where there
	// is a Pack.
	MaxBytes int64
	// Pack has copies of what does not fit into memory; nil is none.
	Pack *pack.Pack
	// Source is where blobs come from and go to.
	Source cas.Store
	// Registerer gets the metrics; nil is none.
	Registerer prometheus.Registerer
}

// Tier is a byte-bounded cache of a store's small blobs, with a larger one in files behind it where
// there is a Pack. It is itself a cas.Store.
type Tier struct {
	source  cas.Store
	pack    *pack.Pack // or nil
	metrics *metrics
	shards  []shard
}

var (
	_ cas.Store     = (*Tier)(nil)
	_ cas.Confirmer = (*Tier)(nil)
	_ cas.Peeker    = (*Tier)(nil)
	_ cas.Resumer   = (*Tier)(nil)
	_ cas.Sizer     = (*Tier)(nil)

	_ cas.FrameOpener = (*Tier)(nil)
)

// New returns a tier that holds nothing yet.
func New(cfg Config) (*Tier, error) {
	if cfg.MaxBytes < 0 || (cfg.MaxBytes == 0 && cfg.Pack == nil) {
		return nil, fmt.Errorf("memory tier: a size of %d bytes holds nothing", cfg.MaxBytes)
	}
	// Each shard has room for many of the largest blobs, or there is only one.
	const most, least = 16, 1 << 20
	count := int64(most)
	if cfg.MaxBytes/count < least {
		count = 1
	}
	t := &Tier{source: cfg.Source, pack: cfg.Pack, shards: make([]shard, count)}
	for i := range t.shards {
		t.shards[i].items = make(map[digest.Digest]*item)
		t.shards[i].max = cfg.MaxBytes / count
	}
	var err error
	if t.metrics, err = newMetrics(cfg.Registerer, t, cfg.MaxBytes); err != nil {
		return nil, fmt.Errorf("memory tier: %w", err)
	}
	return t, nil
}

// takes reports whether a blob is one to be held.
func takes(d digest.Digest) bool {
	return d.Size() > 0 && d.Size() <= MaxBlob && !d.IsImpossible()
}

// shardOf spreads blobs by a digit of their hash that nothing else goes by.
func (t *Tier) shardOf(d digest.Digest) *shard {
	hash := d.Hash()
	return &t.shards[int(hash[len(hash)-1])%len(t.shards)]
}

// Peek implements cas.Peeker.
func (t *Tier) Peek(d digest.Digest) ([]byte, bool) {
	if !takes(d) {
		return nil, false
	}
	data, ok := t.peek(d)
	if ok {
		t.metrics.hits.Inc()
	}
	return data, ok
}

func (t *Tier) peek(d digest.Digest) ([]byte, bool) {
	s := t.shardOf(d)
	i := s.get(d)
	if i == nil {
		return nil, false
	}
	if !i.verified.Load() {
		if d.Space().Of(i.data) != d {
			s.drop(i)
			return nil, false
		}
		i.verified.Store(true)
	}
	return i.data, true
}

// hold takes the bytes of a blob, which nobody may change any more.
func (t *Tier) hold(d digest.Digest, data []byte, verified bool) {
	i := &item{digest: d, data: data}
	i.verified.Store(verified)
	t.metrics.evictions.Add(float64(t.shardOf(d).add(i)))
}

// Open implements cas.Store. A small blob that is not held is read whole, from whatever offset on.
func (t *Tier) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if !takes(d) {
		return t.source.Open(ctx, d, offset)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if data, ok := t.Peek(d); ok {
		return newReader(ctx, data[offset:]), nil
	}
	t.metrics.misses.Inc()
	if data, ok := t.unpack(d); ok {
		return newReader(ctx, data[offset:]), nil
	}
	data, err := cas.ReadAll(ctx, t.source, d, MaxBlob)
	if err != nil {
		return nil, err
	}
	t.hold(d, data, true)
	t.packUp([]digest.Digest{d}, [][]byte{data})
	return newReader(ctx, data[offset:]), nil
}

// unpack takes a blob that is not held from the pack.
func (t *Tier) unpack(d digest.Digest) ([]byte, bool) {
	if t.pack == nil {
		return nil, false
	}
	data, ok := t.pack.Get(d)
	if ok {
		t.hold(d, data, true)
	}
	return data, ok
}

// packUp keeps copies of blobs in the pack.
func (t *Tier) packUp(ds []digest.Digest, data [][]byte) {
	if t.pack != nil && len(ds) > 0 {
		t.pack.Add(ds, data)
	}
}

// OpenFrames implements cas.FrameOpener. A small blob is compressed here, which is faster than to ask
// for its frame.
func (t *Tier) OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if !takes(d) {
		return cas.OpenFrames(ctx, t.source, d, offset)
	}
	return cas.OpenFrames(ctx, struct{ cas.Store }{t}, d, offset)
}

// Put implements cas.Store. The blob is held once the source has it.
func (t *Tier) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return t.keep(d, r, func(r io.Reader) error { return t.source.Put(ctx, d, r) })
}

// keep holds a small blob that put has read to its end.
func (t *Tier) keep(d digest.Digest, r io.Reader, put func(io.Reader) error) error {
	if !takes(d) {
		return put(r)
	}
	seen := &recorder{source: r, data: make([]byte, 0, d.Size())}
	if err := put(seen); err != nil {
		return err
	}
	// A source that has the blob need not read all of it, nor check what it reads; the first use does.
	if !seen.more && int64(len(seen.data)) == d.Size() {
		t.hold(d, seen.data, false)
		t.packUp([]digest.Digest{d}, [][]byte{seen.data})
	}
	return nil
}

// Missing implements cas.Store: only the source can tell.
func (t *Tier) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return t.source.Missing(ctx, ds)
}

// Confirm implements cas.Confirmer.
func (t *Tier) Confirm(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return cas.Confirm(ctx, t.source, ds)
}

// Size implements cas.Sizer.
func (t *Tier) Size(ctx context.Context, space digest.Space, hash string) (int64, error) {
	d, err := cas.Find(ctx, t.source, space, hash)
	return d.Size(), err
}

// Committed implements cas.Resumer.
func (t *Tier) Committed(ctx context.Context, d digest.Digest, upload string) (int64, error) {
	return cas.Committed(ctx, t.source, d, upload)
}

// PutFrom implements cas.Resumer.
func (t *Tier) PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	put := func(r io.Reader) error { return cas.PutFrom(ctx, t.source, d, upload, offset, r) }
	if offset != 0 {
		return put(r)
	}
	return t.keep(d, r, put)
}

// recorder keeps what is read through it, up to the capacity of data.
type recorder struct {
	source io.Reader
	data   []byte
	more   bool // than fits
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.source.Read(p)
	if n > cap(r.data)-len(r.data) {
		r.more = true
	} else {
		r.data = append(r.data, p[:n]...)
	}
	return n, err
}

// reader reads a blob in memory until its context ends.
type reader struct {
	data  []byte
	ended func() error
}

func newReader(ctx context.Context, data []byte) *reader {
	return &reader{data: data, ended: func() error { return context.Cause(ctx) }}
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ended(); err != nil {
		return 0, err
	}
	if len(r.data) == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// WriteTo implements io.WriterTo in one Write.
func (r *reader) WriteTo(w io.Writer) (int64, error) {
	if err := r.ended(); err != nil || len(r.data) == 0 {
		return 0, err
	}
	n, err := w.Write(r.data)
	r.data = r.data[n:]
	if err == nil && len(r.data) > 0 {
		err = io.ErrShortWrite
	}
	return int64(n), err
}

// Close ends the read.
func (r *reader) Close() error {
	r.data = nil
	r.ended = func() error { return errClosed }
	return nil
}

var errClosed = errors.New("read after Close")
