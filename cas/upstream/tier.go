package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Tier is the farm's own store with an upstream behind it. New makes one, Run must go on while it is
// used. See the package comment for what it promises.
type Tier struct {
	local  cas.Store
	client *Client
	log    *slog.Logger

	patience time.Duration
	fetching chan struct{} // a token for each fetch
	started  chan struct{} // closed when Run has begun
	small    *queue        // of blobs to be copied
	large    *queue

	mu       sync.Mutex      // guards the rest
	launch   func(f *flight) // starts a flight; nil before and after Run
	flights  map[digest.Digest]*flight
	promised map[digest.Digest]int // blobs on their way, by how many results need them
}

var (
	_ cas.Store       = (*Tier)(nil)
	_ cas.Confirmer   = (*Tier)(nil)
	_ cas.Resumer     = (*Tier)(nil)
	_ cas.Peeker      = (*Tier)(nil)
	_ cas.BatchPutter = (*Tier)(nil)
	_ cas.BatchReader = (*Tier)(nil)
	_ cas.Sizer       = (*Tier)(nil)
)

// fetches is how many blobs are fetched at once.
const fetches = 32

// New returns a tier on a store. It starts nothing.
func New(local cas.Store, client *Client) *Tier {
	t := &Tier{
		local: local, client: client, log: client.cfg.Log, patience: patience,
		fetching: make(chan struct{}, fetches), started: make(chan struct{}),
		flights: make(map[digest.Digest]*flight), promised: make(map[digest.Digest]int),
	}
	t.small = newQueue("blob", client)
	t.large = newQueue("blob", client)
	queued(client.cfg.Registerer, "blob", func() int { return t.small.length() + t.large.length() })
	return t
}

// Run fetches, copies and watches the upstream's health until ctx ends. What waits to be copied then
// is copied within the bound on draining.
func (t *Tier) Run(ctx context.Context) error {
	var group errgroup.Group
	t.mu.Lock()
	t.launch = func(f *flight) {
		own, cancel := context.WithCancelCause(ctx)
		f.cancel = cancel
		group.Go(func() error {
			defer cancel(nil)
			t.fly(own, f)
			return nil
		})
	}
	close(t.started)
	t.mu.Unlock()
	group.Go(func() error { return t.client.Run(ctx) })
	group.Go(func() error {
		return drained(ctx, t.client.cfg.Drain, func(ctx context.Context, closing <-chan struct{}) {
			t.copyQueued(ctx, closing)
		})
	})
	<-ctx.Done()
	t.mu.Lock()
	t.launch = nil
	t.mu.Unlock()
	return group.Wait()
}

// Open implements cas.Store. What is absent here is fetched from the upstream and stored.
func (t *Tier) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := t.local.Open(ctx, d, offset)
	if err == nil || !errors.Is(err, cas.ErrNotFound) || d.IsImpossible() {
		return r, err
	}
	return fetching{t, err}.Open(ctx, d, offset)
}

// verdict returns the error of a read whose blob is absent here and whose fetch ended with failed.
func (t *Tier) verdict(ctx context.Context, absent, failed error) error {
	switch {
	case failed == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(failed, cas.ErrNotFound), errors.Is(failed, ErrDown), errors.Is(failed, ErrRefused):
		return absent
	case errors.Is(failed, cas.ErrMismatch):
		// A damaged copy of the upstream is as good as none.
		t.log.WarnContext(ctx, "upstream cache has a damaged blob", "err", failed)
		return absent
	}
	return failed
}

// refetches is how often a blob is fetched that was stored and is gone before it could be opened.
const refetches = 3

// fetch returns a blob that is absent here.
func (t *Tier) fetch(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	for range refetches {
		if _, err := t.client.can(d); err != nil {
			return nil, err
		}
		f, err := t.join(ctx, d)
		if err != nil {
			return nil, err
		}
		r, err := t.follow(ctx, f, offset)
		if !errors.Is(err, errGone) {
			return r, err
		}
	}
	return nil, fmt.Errorf("%w: %v is evicted as soon as it is stored", cas.ErrUnavailable, d)
}

// errGone reports a blob that was stored and is not there.
var errGone = errors.New("the blob was stored and is gone")

// follow reads a blob from its flight, or from the store when that has landed. It leaves the flight
// unless the reader that it returns does.
func (t *Tier) follow(ctx context.Context, f *flight, offset int64) (io.ReadCloser, error) {
	if tail := f.window.attach(offset); tail != nil {
		// The first bytes, or that there are none, so that an absent blob is an error of the call.
		data, err := f.window.next(ctx, tail)
		if err == nil || errors.Is(err, io.EOF) {
			return t.reader(ctx, f, tail, data, err), nil
		}
		f.window.detach(tail)
		if !errors.Is(err, errAside) {
			t.leave(f)
			return nil, err
		}
	}
	defer t.leave(f)
	return t.landed(ctx, f, offset)
}

// landed waits for the end of a flight and opens what it has stored.
func (t *Tier) landed(ctx context.Context, f *flight, offset int64) (io.ReadCloser, error) {
	select {
	case <-f.landed:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	switch {
	case errors.Is(f.err, errNotStored) && offset == 0:
		return t.client.Open(ctx, f.digest, 0)
	case errors.Is(f.err, errNotStored):
		// From the middle it could not be verified.
		return nil, fmt.Errorf("%w: %w", cas.ErrUnavailable, f.err)
	case f.err != nil:
		return nil, f.err
	}
	r, err := t.local.Open(ctx, f.digest, offset)
	if errors.Is(err, cas.ErrNotFound) {
		return nil, errGone
	}
	return r, err
}

// reader returns the reader of a flight that has read its first bytes.
func (t *Tier) reader(ctx context.Context, f *flight, at *tail, first []byte, err error) *reader {
	offset := f.window.position(at)
	r := &reader{data: first, err: err}
	r.next = func() ([]byte, error) {
		data, err := f.window.next(ctx, at)
		offset += int64(len(data))
		return data, err
	}
	r.rest = func() (io.ReadCloser, error) {
		rest, err := t.landed(ctx, f, offset)
		if errors.Is(err, errGone) {
			err = fmt.Errorf("%w: %v was evicted while it was read", cas.ErrUnavailable, f.digest)
		}
		return rest, err
	}
	r.leave = func() {
		f.window.detach(at)
		t.leave(f)
	}
	return r
}

// reader reads from a window, and from the store when it was set aside.
type reader struct {
	data  []byte
	err   error // sticky
	next  func() ([]byte, error)
	rest  func() (io.ReadCloser, error)
	leave func()
	tail  io.ReadCloser // from rest
	left  bool
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	for len(r.data) == 0 && r.err == nil && r.tail == nil && len(p) > 0 {
		r.fill()
	}
	if len(r.data) > 0 {
		n := copy(p, r.data)
		r.data = r.data[n:]
		return n, nil
	}
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	n, err := r.tail.Read(p)
	r.err = err
	return n, err
}

// WriteTo implements io.WriterTo.
func (r *reader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		for len(r.data) == 0 && r.err == nil && r.tail == nil {
			r.fill()
		}
		if len(r.data) > 0 {
			n, err := w.Write(r.data)
			total += int64(n)
			r.data = r.data[n:]
			if err != nil {
				return total, err
			}
			continue
		}
		if errors.Is(r.err, io.EOF) {
			return total, nil
		}
		if r.err != nil {
			return total, r.err
		}
		n, err := io.Copy(w, r.tail)
		if err == nil {
			r.err = io.EOF
		}
		return total + n, err
	}
}

func (r *reader) fill() {
	r.data, r.err = r.next()
	if errors.Is(r.err, errAside) {
		r.tail, r.err = r.rest()
	}
}

// Close implements io.Closer.
func (r *reader) Close() error {
	if r.left {
		return nil
	}
	r.left = true
	r.leave()
	if r.tail != nil {
		return r.tail.Close()
	}
	return nil
}

// Put implements cas.Store: the blob is stored here when it returns, and copied to the upstream later.
func (t *Tier) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	err := t.local.Put(ctx, d, r)
	if err == nil {
		t.offer(d)
	}
	return err
}

// Committed implements cas.Resumer.
func (t *Tier) Committed(ctx context.Context, d digest.Digest, upload string) (int64, error) {
	return cas.Committed(ctx, t.local, d, upload)
}

// PutFrom implements cas.Resumer.
func (t *Tier) PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	err := cas.PutFrom(ctx, t.local, d, upload, offset, r)
	if err == nil {
		t.offer(d)
	}
	return err
}

// PutBatch implements cas.BatchPutter.
func (t *Tier) PutBatch(ctx context.Context, ds []digest.Digest, data [][]byte) []error {
	errs := cas.PutBatch(ctx, t.local, arrivals, ds, data)
	for i, d := range ds {
		if errs[i] == nil {
			t.offer(d)
		}
	}
	return errs
}

// ReadBatch implements cas.BatchReader.
func (t *Tier) ReadBatch(ctx context.Context, ds []digest.Digest) ([][]byte, []error) {
	data, errs := cas.ReadBatch(ctx, t.local, arrivals, ds)
	var group errgroup.Group
	group.SetLimit(arrivals)
	for i, err := range errs {
		if !errors.Is(err, cas.ErrNotFound) || ds[i].IsImpossible() {
			continue
		}
		group.Go(func() error {
			data[i], errs[i] = cas.ReadAll(ctx, fetching{t, err}, ds[i], ds[i].Size())
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, errs
	}
	return data, errs
}

// fetching is the tier without its own store, in which a blob is absent.
type fetching struct {
	*Tier
	absent error
}

// Open implements cas.Store.
func (t fetching) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := t.fetch(ctx, d, offset)
	return r, t.verdict(ctx, t.absent, err)
}

// Peek implements cas.Peeker.
func (t *Tier) Peek(d digest.Digest) ([]byte, bool) { return cas.Peek(t.local, d) }

// Size implements cas.Sizer: the upstream finds no blob by its hash alone.
func (t *Tier) Size(ctx context.Context, space digest.Space, hash string) (int64, error) {
	d, err := cas.Find(ctx, t.local, space, hash)
	return d.Size(), err
}

// Missing implements cas.Store. The upstream is not asked: what is present is durable here. A blob
// that a result of the upstream has promised is waited for.
func (t *Tier) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	missing, err := t.local.Missing(ctx, ds)
	if err != nil {
		return nil, err
	}
	return t.arriving(ctx, missing)
}

// Confirm implements cas.Confirmer.
func (t *Tier) Confirm(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	missing, err := cas.Confirm(ctx, t.local, ds)
	if err != nil {
		return nil, err
	}
	return t.arriving(ctx, missing)
}

const (
	// arrival is how long a question waits for promised blobs, of which it fetches a few at once.
	arrival  = 20 * time.Second
	arrivals = 16
)

var errLate = fmt.Errorf("%w: promised blobs are late", cas.ErrUnavailable)

// arriving fetches those of the missing blobs that were promised and returns what is missing then.
func (t *Tier) arriving(ctx context.Context, missing []digest.Digest) ([]digest.Digest, error) {
	var wanted []int
	t.mu.Lock()
	if len(t.promised) > 0 {
		for i, d := range missing {
			if t.promised[d] > 0 {
				wanted = append(wanted, i)
			}
		}
	}
	t.mu.Unlock()
	if len(wanted) == 0 {
		return missing, nil
	}
	bound, cancel := context.WithTimeoutCause(ctx, arrival, errLate)
	defer cancel()
	var group errgroup.Group
	group.SetLimit(arrivals)
	arrived := make([]bool, len(missing))
	for _, i := range wanted {
		group.Go(func() error {
			arrived[i] = t.ensure(bound, missing[i]) == nil
			return nil
		})
	}
	if err := group.Wait(); err != nil || ctx.Err() != nil {
		return nil, errors.Join(err, context.Cause(ctx))
	}
	still := missing[:0]
	for i, d := range missing {
		if !arrived[i] {
			still = append(still, d)
		}
	}
	return still, nil
}

// ensure fetches a blob that is absent here.
func (t *Tier) ensure(ctx context.Context, d digest.Digest) error {
	f, err := t.join(ctx, d)
	if err != nil {
		return err
	}
	defer t.leave(f)
	select {
	case <-f.landed:
		return f.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
