package upstream

import (
	"context"
	"errors"
	"math"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// queue holds what is to be copied to the upstream. What does not fit is dropped.
type queue struct {
	kind    string
	client  *Client
	entries chan digest.Digest
}

func newQueue(kind string, client *Client) *queue {
	return &queue{kind: kind, client: client, entries: make(chan digest.Digest, client.cfg.Queue)}
}

func (q *queue) length() int { return len(q.entries) }

// count counts what became of n entries.
func (q *queue) count(result string, n int) {
	q.client.metrics.copies.WithLabelValues(q.kind, result).Add(float64(n))
}

// offer adds an entry.
func (q *queue) offer(d digest.Digest) {
	select {
	case q.entries <- d:
	default:
		q.count("full", 1)
	}
}

// next waits for an entry; false is the end, which comes when the queue is empty after closing.
func (q *queue) next(closing <-chan struct{}) (digest.Digest, bool) {
	select {
	case d := <-q.entries:
		return d, true
	case <-closing:
	}
	select {
	case d := <-q.entries:
		return d, true
	default:
		return digest.Digest{}, false
	}
}

// more returns first and what else is in the queue, up to n.
func (q *queue) more(first digest.Digest, n int) []digest.Digest {
	ds := []digest.Digest{first}
	for len(ds) < n {
		select {
		case d := <-q.entries:
			ds = append(ds, d)
		default:
			return ds
		}
	}
	return ds
}

// drained calls work with a context that ends the bound after ctx does, and with what tells that.
func drained(ctx context.Context, bound time.Duration, work func(ctx context.Context, closing <-chan struct{})) error {
	own, stop := context.WithCancelCause(context.WithoutCancel(ctx)) //nolint:forbidigo // ends the bound after ctx
	defer stop(nil)
	timer := time.AfterFunc(math.MaxInt64, func() { stop(errEnded) })
	defer timer.Stop()
	defer context.AfterFunc(ctx, func() { timer.Reset(bound) })()
	work(own, ctx.Done())
	return nil
}

// outcome is the word for how a transfer ended.
func outcome(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, cas.ErrNotFound):
		return "absent"
	case errors.Is(err, cas.ErrMismatch):
		return "damaged"
	case errors.Is(err, ErrDown):
		return "down"
	case errors.Is(err, ErrRefused):
		return "refused"
	case errors.Is(err, errAbandoned), errors.Is(err, errEnded):
		return "abandoned"
	}
	return "failed"
}

// How blobs are copied: small ones many at a time, and large ones where they hold up no small ones.
const (
	copiers   = 2
	copyBatch = 500
)

// offer queues a blob that was stored here.
func (t *Tier) offer(d digest.Digest) {
	if d.IsEmpty() {
		return
	}
	q := t.small
	if d.Size() > smallBlob {
		q = t.large
	}
	if _, err := t.client.canStore(d); err != nil {
		q.count(outcome(err), 1)
		return
	}
	q.offer(d)
}

// copyQueued copies what is queued until closing, and then what is left.
func (t *Tier) copyQueued(ctx context.Context, closing <-chan struct{}) {
	var group errgroup.Group
	for range copiers {
		for q, batch := range map[*queue]int{t.small: copyBatch, t.large: 1} {
			group.Go(func() error {
				for {
					d, ok := q.next(closing)
					if !ok {
						return nil
					}
					t.copy(ctx, q.more(d, batch))
				}
			})
		}
	}
	_ = group.Wait() //nolint:errcheck // none of them fails
}

// copy brings blobs that are here to the upstream and returns those that are not there after it.
func (t *Tier) copy(ctx context.Context, ds []digest.Digest) []digest.Digest {
	missing, err := t.client.Missing(ctx, ds)
	if err != nil {
		t.small.count(outcome(err), len(ds))
		return ds
	}
	t.small.count("present", len(ds)-len(missing))
	var left []digest.Digest
	ended := func(d digest.Digest, err error) {
		t.small.count(outcome(err), 1)
		if err != nil {
			left = append(left, d)
		}
	}
	batches := make(map[digest.Space]*batch)
	for _, d := range missing {
		can, err := t.client.canStore(d)
		if err != nil {
			ended(d, err)
			continue
		}
		if d.Size() > min(smallBlob, can.batch) {
			ended(d, t.copyLarge(ctx, d))
			continue
		}
		data, err := cas.ReadAll(ctx, t.local, d, smallBlob)
		if err != nil {
			ended(d, err)
			continue
		}
		b := batches[d.Space()]
		if b == nil {
			b = new(batch)
			batches[d.Space()] = b
		}
		if b.bytes+d.Size() > can.batch || len(b.blobs) == copyBatch {
			b.flush(ctx, t.client, ended)
		}
		b.blobs = append(b.blobs, blob{d, data})
		b.bytes += d.Size()
	}
	for _, b := range batches {
		b.flush(ctx, t.client, ended)
	}
	return left
}

// batch is blobs of one space that are stored with one call.
type batch struct {
	blobs []blob
	bytes int64
}

// flush stores the blobs and tells what became of each.
func (b *batch) flush(ctx context.Context, client *Client, ended func(d digest.Digest, err error)) {
	if len(b.blobs) == 0 {
		return
	}
	errs, err := client.putBatch(ctx, b.blobs)
	for i, blob := range b.blobs {
		if err != nil {
			ended(blob.digest, err)
		} else {
			ended(blob.digest, errs[i])
		}
	}
	*b = batch{}
}

func (t *Tier) copyLarge(ctx context.Context, d digest.Digest) error {
	r, err := t.local.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	return errors.Join(t.client.Put(ctx, d, r), r.Close())
}
