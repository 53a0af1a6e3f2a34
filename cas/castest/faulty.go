package castest

import (
	"context"
	"io"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Op is a method of cas.Store.
type Op string

// The methods of cas.Store.
const (
	OpOpen    Op = "Open"
	OpPut     Op = "Put"
	OpMissing Op = "Missing"
)

// Fault is what goes wrong in one call. The zero Fault is that nothing does.
type Fault struct {
	// After is how many bytes of the blob pass, in either direction, before the fault happens. A
	// fault of Open or Put with After < 0 is the failure of the call itself; Missing ignores After.
	After int64
	// Stall is a store that does not answer until ctx ends.
	Stall bool
	// Truncate is a blob that ends with io.EOF before its time.
	Truncate bool
	// Lie is a wrong byte in a read or a stored blob, and a Missing that finds everything present.
	Lie bool
	// Err is a call that fails.
	Err error
}

// Faulty is a store that breaks the contract when its Plan says so.
type Faulty struct {
	// Store is what does the work.
	Store cas.Store
	// Plan decides about a call before it begins; nil is no fault. It is called concurrently. d is
	// the zero Digest for Missing.
	Plan func(op Op, d digest.Digest) Fault
}

var _ cas.Store = (*Faulty)(nil)

// Open implements cas.Store.
func (f *Faulty) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	fault := f.plan(OpOpen, d)
	if fault.After < 0 {
		if err := fault.strike(ctx); err != nil {
			return nil, err
		}
	}
	r, err := f.Store.Open(ctx, d, offset)
	if err != nil || fault == (Fault{}) {
		return r, err
	}
	return struct {
		io.Reader
		io.Closer
	}{fault.reader(ctx, r), r}, nil
}

// Put implements cas.Store. A blob that is truncated or lied about is reported as stored and is
// not there.
func (f *Faulty) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	return f.put(ctx, d, r, f.Store.Put)
}

func (f *Faulty) put(ctx context.Context, d digest.Digest, r io.Reader, store func(context.Context, digest.Digest, io.Reader) error) error {
	fault := f.plan(OpPut, d)
	if fault == (Fault{}) {
		return store(ctx, d, r)
	}
	if fault.After < 0 {
		if err := fault.strike(ctx); err != nil {
			return err
		}
	}
	if fault.Truncate || fault.Lie {
		_, err := io.Copy(io.Discard, r)
		return err
	}
	return store(ctx, d, fault.reader(ctx, r))
}

// Missing implements cas.Store.
func (f *Faulty) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	fault := f.plan(OpMissing, digest.Digest{})
	if err := fault.strike(ctx); err != nil {
		return nil, err
	}
	if fault.Lie {
		return nil, nil
	}
	return f.Store.Missing(ctx, ds)
}

// Size implements cas.Sizer without a fault.
func (f *Faulty) Size(ctx context.Context, space digest.Space, hash string) (int64, error) {
	d, err := cas.Find(ctx, f.Store, space, hash)
	return d.Size(), err
}

// Committed implements cas.Resumer without a fault.
func (f *Faulty) Committed(ctx context.Context, d digest.Digest, upload string) (int64, error) {
	return cas.Committed(ctx, f.Store, d, upload)
}

// PutFrom implements cas.Resumer with the faults of Put.
func (f *Faulty) PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	return f.put(ctx, d, r, func(ctx context.Context, d digest.Digest, r io.Reader) error {
		return cas.PutFrom(ctx, f.Store, d, upload, offset, r)
	})
}

func (f *Faulty) plan(op Op, d digest.Digest) Fault {
	if f.Plan == nil {
		return Fault{}
	}
	return f.Plan(op, d)
}

// strike is the fault of a call as a whole.
func (f Fault) strike(ctx context.Context) error {
	if f.Stall {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return f.Err
}

// reader returns r with the fault in its bytes.
func (f Fault) reader(ctx context.Context, r io.Reader) io.Reader {
	at := int64(0)
	return readerFunc(func(p []byte) (int, error) {
		left := f.After - at
		switch {
		case left > 0:
			p = p[:min(int64(len(p)), left)]
		case f.Stall || f.Err != nil:
			return 0, f.strike(ctx)
		case f.Truncate:
			return 0, io.EOF
		}
		n, err := r.Read(p)
		if f.Lie && left <= 0 && n > 0 {
			p[0] ^= 1
			f.Lie = false
		}
		at += int64(n)
		return n, err
	})
}
