package disk

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

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

// fetch completes the flight's file from the source and makes it the variant k.
func (t *Tier) fetch(ctx context.Context, f *flight, k key, d digest.Digest) (entry, error) {
	if f.part != nil && f.part.torn {
		f.part.discard(ctx, t)
		f.part = nil
	}
	if f.part == nil {
		part, err := t.begin(ctx, d)
		if err != nil {
			return entry{}, err
		}
		f.part = part
	}
	if err := t.download(ctx, f.part, d); err != nil {
		if ctx.Err() == nil {
			f.part.discard(ctx, t)
			f.part = nil
		}
		return entry{}, err
	}
	part := f.part
	f.part = nil
	return t.seal(ctx, part, k)
}

// download appends what is missing and verifies the whole.
func (t *Tier) download(ctx context.Context, p *partial, d digest.Digest) error {
	from := p.seen.Size()
	r, err := t.source.Open(ctx, d, from)
	if err != nil {
		return err
	}
	_, err = io.Copy(p, r)
	t.metrics.fetched.Add(float64(p.seen.Size() - from))
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	return p.seen.Verdict()
}

// seal turns a whole and verified partial into a cached file. The partial is used up.
func (t *Tier) seal(ctx context.Context, p *partial, k key) (entry, error) {
	e := entry{key: k, size: p.size, generation: t.generations.Add(1)}
	err := p.file.Chmod(mode(k.executable))
	if err == nil {
		err = os.Rename(p.file.Name(), t.path(e))
	}
	if err != nil {
		p.discard(ctx, t)
		return entry{}, err
	}
	t.insert(ctx, e)
	return e, p.file.Close()
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
	if !t.replay(ctx, old, seen, seen) {
		return entry{}, false
	}
	e := entry{key: old.key, size: old.size, generation: t.generations.Add(1)}
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
	if err == nil || ctx.Err() != nil || isFull(err) {
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

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
