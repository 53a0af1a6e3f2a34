package objectstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

var (
	_ cas.BatchPutter = (*Store)(nil)
	_ cas.BatchReader = (*Store)(nil)
)

const (
	// batchWindow and batchBytes bound what is under way of one batch.
	batchWindow = 256
	batchBytes  = 8 << 20
	// batchLeast is the number of blobs below which a batch gains nothing.
	batchLeast = 4
)

// PutBatch stores blobs, see cas.BatchPutter. Small ones are published in a row before the first
// acknowledgement is waited for, which costs two thirds of what Put after Put does.
func (s *Store) PutBatch(ctx context.Context, ds []digest.Digest, data [][]byte) []error {
	w := batchWriter{store: s, errs: make([]error, len(ds))}
	var single []int
	for i, d := range ds {
		_, known := s.index.get(keyOf(d), d.Size())
		switch {
		case known, len(ds) < batchLeast, d.IsEmpty(), d.IsImpossible(), familyOf(d) == large:
			single = append(single, i)
		default:
			w.put(ctx, i, d, data[i])
		}
	}
	w.await(ctx, 0)
	oneByOne(append(single, w.again...), func(i int) { w.errs[i] = s.Put(ctx, ds[i], bytes.NewReader(data[i])) })
	return w.errs
}

// oneByOne calls f for what is left of a batch.
func oneByOne(left []int, f func(i int)) {
	const width = 16
	var group errgroup.Group
	group.SetLimit(width)
	for _, i := range left {
		group.Go(func() error {
			f(i)
			return nil
		})
	}
	group.Wait() //nolint:errcheck // no function of it fails
}

// batchWriter publishes the small blobs of a batch.
type batchWriter struct {
	store  *Store
	errs   []error
	sent   []batchPut // oldest first; their acknowledgements were not waited for
	bytes  int64      // in sent
	silent bool       // the broker did not answer in time
	again  []int      // to be put one by one, since the broker was busy or full
}

// batchPut is a chunk on its way, which holds its size of its bucket's budget.
type batchPut struct {
	i      int
	digest digest.Digest
	bucket *bucket
	ack    *ack
	done   func()
}

func (w *batchWriter) put(ctx context.Context, i int, d digest.Digest, data []byte) {
	if err := w.publish(ctx, i, d, data); err != nil {
		w.end(i, d, err)
	}
}

// end records how a put ended.
func (w *batchWriter) end(i int, d digest.Digest, err error) {
	w.store.metrics.puts.WithLabelValues(result(err)).Inc()
	if err != nil {
		w.store.suspect(err)
		w.errs[i] = fmt.Errorf("store blob %v: %w", d, err)
	}
}

func (w *batchWriter) publish(ctx context.Context, i int, d digest.Digest, data []byte) error {
	s := w.store
	if d.Space().Of(data) != d {
		return fmt.Errorf("%w: the bytes have another digest", cas.ErrMismatch)
	}
	b, done, err := s.place(ctx, d, d.Size())
	if err != nil {
		return err
	}
	for len(w.sent) == batchWindow || w.bytes+d.Size() > batchBytes {
		w.await(ctx, len(w.sent)-1)
	}
	for !b.budget.TryAcquire(d.Size()) {
		if len(w.sent) > 0 {
			w.await(ctx, len(w.sent)-1) // what this batch holds comes back with its own acknowledgements
		} else if err := b.budget.Acquire(ctx, d.Size()); err != nil {
			done()
			return ended(ctx)
		} else {
			break
		}
	}
	a, err := s.sendSmall(ctx, b, d, data)
	if err != nil {
		b.budget.Release(d.Size())
		done()
		return err
	}
	w.sent = append(w.sent, batchPut{i: i, digest: d, bucket: b, ack: a, done: done})
	w.bytes += d.Size()
	return nil
}

// await returns when at most n chunks are not acknowledged. Once the broker was silent for the
// bound of a request, only acknowledgements that are there count.
func (w *batchWriter) await(ctx context.Context, n int) {
	s := w.store
	for len(w.sent) > n {
		p := w.sent[0]
		w.sent, w.bytes = w.sent[1:], w.bytes-p.digest.Size()
		timeout := s.cfg.RequestTimeout
		if w.silent {
			timeout = 0
		}
		_, err := p.ack.wait(ctx, timeout)
		w.silent = w.silent || !p.ack.answered()
		p.ack.forget()
		p.bucket.budget.Release(p.digest.Size())
		p.done()
		switch {
		case errors.Is(err, errBusy), errors.Is(err, cas.ErrFull):
			w.again = append(w.again, p.i)
			continue
		case err == nil, errors.Is(err, errExists):
			s.stored(p.bucket, p.digest)
			err = s.settle(ctx, p.digest)
		}
		w.end(p.i, p.digest, err)
	}
}

// ReadBatch returns blobs, see cas.BatchReader. Small ones that the index knows are asked for in a row on
// one connection, which costs half of what Open after Open does. Whatever does not come as it should
// is left to Open.
func (s *Store) ReadBatch(ctx context.Context, ds []digest.Digest) (data [][]byte, errs []error) {
	r := batchReader{store: s, ds: ds, data: make([][]byte, len(ds)), errs: make([]error, len(ds))}
	if err := r.read(ctx); err != nil {
		for i := range r.asked {
			r.errs[i] = fmt.Errorf("read blob %v: %w", ds[i], err)
			s.metrics.gets.WithLabelValues(result(err)).Inc()
		}
	}
	oneByOne(r.left, func(i int) { r.data[i], r.errs[i] = cas.ReadAll(ctx, s, ds[i], ds[i].Size()) })
	return r.data, r.errs
}

// batchReader reads the small blobs of a batch.
type batchReader struct {
	store *Store
	ds    []digest.Digest
	data  [][]byte
	errs  []error

	inbox string
	asked map[int]struct{} // those to be answered yet
	bytes int64            // of them
	left  []int            // to be read one by one
}

// read reads what it can. After an error, those that were asked for and all after them are in asked.
func (r *batchReader) read(ctx context.Context) error {
	conn := r.store.small.conn
	r.asked = make(map[int]struct{})
	arriving := make(chan *nats.Msg, batchWindow)
	r.inbox = conn.NewInbox() + "."
	sub, err := conn.ChanSubscribe(r.inbox+"*", arriving)
	if err == nil {
		defer sub.Unsubscribe() //nolint:errcheck // the connection is closed
	}
	for i, d := range r.ds {
		b := r.store.knownIn(d)
		if b == nil || b.family == large || len(r.ds) < batchLeast {
			r.left = append(r.left, i)
			continue
		}
		for err == nil && len(r.asked) > 0 && (len(r.asked) == batchWindow || r.bytes+d.Size() > batchBytes) {
			err = r.receive(ctx, arriving)
		}
		if err == nil {
			err = brokerError(ctx, conn.PublishRequest("$JS.API.DIRECT.GET."+b.stream+"."+b.chunks+tail(d), r.inbox+strconv.Itoa(i), nil))
		}
		r.asked[i] = struct{}{}
		r.bytes += d.Size()
	}
	for err == nil && len(r.asked) > 0 {
		err = r.receive(ctx, arriving)
	}
	return err
}

// receive takes one answer.
func (r *batchReader) receive(ctx context.Context, arriving <-chan *nats.Msg) error {
	m, err := receive(ctx, arriving, r.store.cfg.RequestTimeout)
	if err != nil {
		return err
	}
	i := r.which(m.Subject)
	if i < 0 {
		return nil
	}
	delete(r.asked, i)
	d := r.ds[i]
	r.bytes -= d.Size()
	data, whole := m.Data, false
	if header(m, "Status") == "" {
		data, whole = wholly(d, m.Header, m.Data)
	}
	if !whole {
		r.left = append(r.left, i)
		return nil
	}
	r.data[i] = data
	r.store.touched(keyOf(d), d)
	r.store.metrics.gets.WithLabelValues(result(nil)).Inc()
	r.store.metrics.readBytes.Add(float64(d.Size()))
	return nil
}

// which tells what a subject answers, or -1 when nobody waits for that.
func (r *batchReader) which(subject string) int {
	i, err := strconv.Atoi(subject[len(r.inbox):])
	if _, ok := r.asked[i]; err != nil || !ok {
		return -1
	}
	return i
}

// knownIn returns the bucket in which the index knows the blob, or nil.
func (s *Store) knownIn(d digest.Digest) *bucket {
	if d.IsEmpty() || d.IsImpossible() {
		return nil
	}
	e, known := s.index.get(keyOf(d), d.Size())
	if !known {
		return nil
	}
	g := s.generation(e.generation())
	if g == nil {
		return nil
	}
	return g.bucket(d)
}
