package disk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

const (
	// smallest is the size below which a blob that is read is not made a file of: that costs more than
	// to read it from the source a few times, and cas/memory holds it.
	smallest = 64 << 10
	// share is the part of the tier that a blob may take to be fetched by a read, and that all such
	// fetches may take together: 1/8 and 1/2.
	share, shareOfAll = 8, 2
	// eager is the size from which Config.SecondRead does not count: a file costs little beside the read.
	eager = 4 << 20
	// attempts is how often a file may vanish before its use.
	attempts = 5
)

// Open implements cas.Store. A blob that is not held is fetched into the tier by whoever reads it from
// the start (for the second time, see Config), and read by all who want it while that goes on. A part of a blob, a blob that would take
// too much of the tier and one that is not worth a file come from the source.
func (t *Tier) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if d.IsEmpty() {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	for range attempts {
		e, f, k := t.find(d, offset)
		var r io.ReadCloser
		var err error
		switch {
		case f != nil:
			r, err = t.follow(ctx, f, k, d)
		case e.size != 0:
			r, err = t.openFile(ctx, e, d, offset)
		default:
			return t.source.Open(ctx, d, offset)
		}
		switch {
		case err == nil:
			return r, nil
		case f != nil && errors.Is(err, errElsewhere):
		case f != nil && !isLocal(err):
			return nil, err
		case f == nil && errors.Is(err, fs.ErrNotExist):
			t.drop(ctx, e)
		default:
			t.log.WarnContext(ctx, "the disk tier gives way to its source", "blob", d, "err", err)
			t.metrics.gaveWay.Inc()
			return t.source.Open(ctx, d, offset)
		}
	}
	return t.source.Open(ctx, d, offset)
}

// OpenFrames implements cas.FrameOpener. Frames that the source has cost it no compression, so a file is
// compressed only when the source has none or does not answer.
func (t *Tier) OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if frames, ok := t.source.(cas.FrameOpener); ok {
		r, err := frames.OpenFrames(ctx, d, offset)
		if err == nil || ctx.Err() != nil || !t.holds(d) {
			return r, err
		}
	}
	return cas.OpenFrames(ctx, struct{ cas.Store }{t}, d, offset)
}

// find returns the entry to read from or a flight with the caller in it, or neither.
func (t *Tier) find(d digest.Digest, offset int64) (entry, *flight, key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	plain := t.keyOf(d, false)
	executable := plain
	executable.executable = true
	for _, fresh := range []bool{true, offset != 0} { // A file from before the last boot is hashed: read from its start.
		for _, k := range []key{plain, executable} {
			if e, ok := t.index.get(k); ok && e.size == d.Size() && (e.generation >= t.trusted || !fresh) {
				t.index.use(k)
				t.metrics.hits.Inc()
				return e, nil, k
			}
		}
	}
	if offset != 0 || d.IsImpossible() || d.Size() <= smallest || cost(d.Size()) > t.max/share {
		return entry{}, nil, plain
	}
	if t.flights[plain] == nil && (t.reserved+cost(d.Size()) > t.max/shareOfAll || t.second && d.Size() < eager && !t.lately.again(plain)) {
		return entry{}, nil, plain
	}
	return entry{}, t.join(plain), plain
}

// follow returns a reader of a blob that is being fetched. It has left the flight when it fails.
func (t *Tier) follow(ctx context.Context, f *flight, k key, d digest.Digest) (io.ReadCloser, error) {
	s := t.newStream(ctx, f, k, d)
	if err := s.prime(ctx); err != nil {
		s.leave()
		return nil, err
	}
	return s, nil
}

// Put implements cas.Store. What is written is not held: most of it is never read, and then its first
// reader pays for the file, not its writer.
func (t *Tier) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return t.source.Put(ctx, d, r)
}

// Missing implements cas.Store.
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
	return cas.PutFrom(ctx, t.source, d, upload, offset, r)
}
