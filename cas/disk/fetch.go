package disk

import (
	"context"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"os"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// mode is what a cached file has: nobody writes it.
func mode(executable bool) os.FileMode {
	if executable {
		return 0o555
	}
	return 0o444
}

// download fetches the whole blob and verifies it.
func (t *Tier) download(ctx context.Context, p *partial, d digest.Digest) error {
	r, err := t.source.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(p, r)
	t.metrics.fetched.Add(float64(p.seen.Size()))
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	return p.seen.Verdict()
}

// convert makes the variant k from what the tier holds: the same variant from before the last boot
// or the other one, in either case verified. It reports false when the blob has to be fetched.
func (t *Tier) convert(ctx context.Context, k key, d digest.Digest) (entry, bool) {
	other := k
	other.executable = !k.executable
	t.mu.Lock()
	same, ok := t.index.get(k)
	from, fromOther := t.index.get(other)
	t.mu.Unlock()
	switch {
	case ok && same.size == d.Size() && same.generation >= t.trusted:
		return same, true // adopted since the lookup
	case ok && same.size == d.Size():
		return t.check(ctx, same, d)
	case !fromOther || from.size != d.Size():
		return entry{}, false
	}
	part, err := t.begin(ctx, d)
	if err != nil {
		return entry{}, false
	}
	if !t.replay(ctx, from, part, part.seen) {
		part.discard(ctx, t)
		return entry{}, false
	}
	e, err := t.seal(ctx, part, k)
	return e, err == nil
}

// check hashes a file from before the last boot and gives it a generation of this one, or drops it.
func (t *Tier) check(ctx context.Context, old entry, d digest.Digest) (entry, bool) {
	seen := cas.NewVerifier(d)
	sum := crc32.New(castagnoli())
	if !t.replay(ctx, old, io.MultiWriter(seen, sum), seen) {
		return entry{}, false
	}
	return t.renew(ctx, old, sum.Sum32())
}

// renew gives a file that was found to be right a generation of this boot, and its sum.
func (t *Tier) renew(ctx context.Context, old entry, sum uint32) (entry, bool) {
	e := entry{key: old.key, size: old.size, generation: t.generations.Add(1), sum: sum, summed: true}
	if os.Rename(t.path(old), t.path(e)) != nil {
		t.drop(ctx, old)
		return entry{}, false
	}
	t.mu.Lock()
	t.reserved += cost(e.size) // which insert takes back
	t.mu.Unlock()
	t.insert(ctx, e)
	return e, true
}

// replay writes a cached file to w, which feeds seen, and reports whether all of it arrived and has
// its digest. A file that turns out damaged is dropped.
func (t *Tier) replay(ctx context.Context, e entry, w io.Writer, seen *cas.Verifier) bool {
	f, err := os.Open(t.path(e))
	if err == nil {
		err = errors.Join(copyAll(ctx, w, f), f.Close())
	}
	if err == nil {
		err = seen.Verdict()
	}
	if err == nil || ctx.Err() != nil || isLocal(err) {
		return err == nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.log.WarnContext(ctx, "cached file is damaged", "blob", seen.Digest(), "err", err)
	}
	t.drop(ctx, e)
	return false
}

// copyAll copies r to its end, and looks at ctx every now and then.
func copyAll(ctx context.Context, w io.Writer, r io.Reader) error {
	const step = 16 << 20
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := io.CopyN(w, r, step)
		if errors.Is(err, io.EOF) && n < step {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
