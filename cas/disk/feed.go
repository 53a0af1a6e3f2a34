package disk

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// A feed is a reader of the source that several callers use in turn. Nobody but the one who reads
// right now has a say in how long it takes: the end of that caller's context ends the feed, the end
// of any other does not.
type feed struct {
	r   io.ReadCloser
	end context.CancelCauseFunc
}

// errFed ends the context of a feed that is not needed any more.
var errFed = errors.New("disk tier: the fetch has ended")

// openFeed opens the source. The feed outlives ctx unless that ends during a call of it.
func (t *Tier) openFeed(ctx context.Context, d digest.Digest, offset int64) (*feed, error) {
	//nolint:forbidigo // Every use of the feed is bounded by the context of who uses it, see lend.
	shared, end := context.WithCancelCause(context.WithoutCancel(ctx))
	f := &feed{end: end}
	back := f.lend(ctx)
	r, err := t.source.Open(shared, d, offset)
	if !back() {
		if err == nil {
			err = r.Close()
		}
		return nil, errors.Join(context.Cause(ctx), err)
	}
	if err != nil {
		end(err)
		return nil, err
	}
	f.r = r
	return f, nil
}

// lend makes the end of ctx that of the feed until back is called, which reports false when that has
// happened.
func (f *feed) lend(ctx context.Context) (back func() bool) {
	return context.AfterFunc(ctx, func() { f.end(context.Cause(ctx)) })
}

// read reads at least a byte. After an error the feed has to be closed.
func (f *feed) read(ctx context.Context, p []byte) (int, error) {
	back := f.lend(ctx)
	n, err := io.ReadAtLeast(f.r, p, 1)
	if !back() {
		err = context.Cause(ctx)
	}
	return n, err
}

// verdict is what the source says at the end of the blob: io.EOF, or what is wrong with it.
func (f *feed) verdict(ctx context.Context) error {
	var more [1]byte
	_, err := f.read(ctx, more[:])
	if err == nil {
		err = fmt.Errorf("%w: it continues after its end", cas.ErrMismatch)
	}
	return err
}

// close ends the feed; f may be nil.
func (f *feed) close() {
	if f == nil {
		return
	}
	f.r.Close() //nolint:errcheck // What was read is verified.
	f.end(errFed)
}
