package objectstore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// uploadWindow is how many chunks of one upload wait for their acknowledgement at most.
const uploadWindow = 8

// upload writes one large blob. Its chunks have a subject of their own, so uploads of the same blob
// don't meet until one of them stores the metadata, which is what makes the blob visible; the
// others find it and remove their chunks. Every upload ends in commit, keep, abandon or leave.
type upload struct {
	store  *Store
	bucket *bucket
	digest digest.Digest
	token  string // names the client's upload

	nuid    string
	hash    *asideHash
	sum     hash.Hash // the SHA-256 of the payloads, nil where that is hash
	size    int64     // of the payloads
	encoder encoder
	begun   bool     // a chunk was sent
	unacked []sent   // oldest first
	stored  []uint64 // the sequences of the acknowledged chunks
	sent    int      // chunks
}

// sent is a chunk on its way, which holds its size of the bucket's budget.
type sent struct {
	ack  *ack
	size int64
}

// subject is that of the chunks.
func (u *upload) subject() string { return u.bucket.chunks + u.nuid }

// putLarge stores a blob of more than one chunk. The token is uploadToken of the client's name for
// the upload.
func (s *Store) putLarge(ctx context.Context, d digest.Digest, token string, r io.Reader) error {
	b, done, err := s.place(ctx, d, d.Size()+frameRoom*int64(chunksOf(d)))
	if err != nil {
		return err
	}
	defer done()
	if _, err := s.findObject(ctx, b, d, false); err == nil {
		s.index.set(keyOf(d), newEntry(b, d.Size()))
		return nil
	} else if !errors.Is(err, cas.ErrNotFound) {
		return err
	}
	u := upload{
		store: s, bucket: b, digest: d, token: token,
		nuid: tail(d) + "." + token + "." + nuid.Next(), hash: newAsideHash(d.Space().Function()),
		encoder: encoder{mode: s.cfg.Compression, busy: s.busy},
	}
	if copied, ok := r.(*largeReader); ok && copied.object.zstd {
		u.encoder.mode = CompressAll // it stays as it is
	}
	err = u.send(ctx, r)
	if err == nil {
		err = u.commit(ctx)
	}
	return u.end(ctx, err)
}

// end cleans up after an upload that ended with this error, and returns what Put returns.
func (u *upload) end(ctx context.Context, err error) error {
	s := u.store
	_, known := s.index.get(keyOf(u.digest), u.digest.Size())
	switch {
	case err == nil:
		s.stored(u.bucket, u.digest)
		u.clear(ctx)
	case errors.Is(err, errUncertain):
		u.leave(ctx, err)
	case errors.Is(err, errExists):
		u.abandon(ctx)
		s.stored(u.bucket, u.digest)
		return nil
	case errors.Is(err, errKnown):
		u.abandon(ctx)
		return nil
	case errors.Is(err, cas.ErrMismatch):
		u.abandon(ctx)
		u.disown(ctx)
	case errors.Is(err, errSuperseded):
		u.abandon(ctx)
		// Who stores the blob removes what others have of it, also of those that go on.
		if _, e := s.findObject(ctx, u.bucket, u.digest, true); e == nil {
			s.stored(u.bucket, u.digest)
			return nil
		}
	case u.token == noUpload, known, errors.Is(err, cas.ErrFull):
		u.abandon(ctx)
	default:
		u.keep(ctx)
	}
	return err
}

// errKnown ends an upload of a blob that the index has learned of meanwhile.
var errKnown = errors.New("stored by another upload")

// send publishes the chunks and returns when all are stored, or errKnown.
func (u *upload) send(ctx context.Context, r io.Reader) error {
	// One is hashed and sent while the other fills.
	buffer, other := u.store.buffers.get(chunkSize), u.store.buffers.get(chunkSize)
	defer func() {
		u.hash.wait()
		u.store.buffers.put(buffer)
		u.store.buffers.put(other)
	}()
	src := source{r: r}
	for left := u.digest.Size(); left > 0; buffer, other = other, buffer {
		if e, known := u.store.index.get(keyOf(u.digest), u.digest.Size()); known && e.generation() >= u.bucket.generation {
			return errKnown
		}
		data := buffer[:min(left, chunkSize)]
		began := time.Now()
		if err := src.fill(ctx, data); err != nil {
			return err
		}
		took := time.Since(began)
		left -= int64(len(data))
		u.hash.write(data)
		payload := u.encode(data, took)
		if left > 0 {
			if err := u.publish(ctx, payload, 0); err != nil {
				return err
			}
			continue
		}
		if err := u.verify(ctx, &src); err != nil {
			return err
		}
		// The last chunk makes the upload complete. It is refused when someone stopped the upload.
		if err := u.await(ctx, 0); err != nil {
			return err
		}
		if err := u.publish(ctx, payload, u.stored[len(u.stored)-1]); err != nil {
			return err
		}
	}
	err := u.await(ctx, 0)
	if errors.Is(err, errExists) {
		return fmt.Errorf("%w: %w", cas.ErrUnavailable, errSuperseded)
	}
	if err != nil {
		return err
	}
	return u.complete(ctx)
}

// complete tells whether all chunks are there. Who stopped the upload while it lacked several removed
// those before, and the last one's condition does not show that; with the last one stored nobody stops
// it any more.
func (u *upload) complete(ctx context.Context) error {
	var n uint64
	err := u.store.bulk.counts(ctx, u.bucket.stream, u.subject(), func(_ string, messages uint64) { n = messages })
	if err == nil && n != uint64(len(u.stored)) {
		err = fmt.Errorf("%w: %w", cas.ErrUnavailable, errSuperseded)
	}
	return err
}

// errSuperseded ends an upload that was stopped by another one, see store.stop.
var errSuperseded = errors.New("another upload of the same name went on")

// encode returns the payload of the next chunk, which took so long to come.
func (u *upload) encode(data []byte, took time.Duration) []byte {
	if u.sent == 0 {
		u.encoder.begin(data, took)
		if u.encoder.frames || u.digest.Space().Function() != digest.SHA256 {
			u.sum = sha256.New()
		}
	}
	payload := u.encoder.encode(data, took)
	if u.sum != nil {
		u.sum.Write(payload)
	}
	u.size += int64(len(payload))
	return payload
}

// form is how the blob is stored.
func (u *upload) form() form {
	f := form{zstd: u.encoder.frames, size: u.size}
	if u.sum != nil {
		f.sha256 = u.sum.Sum(nil)
	} else {
		f.sha256 = hashBytes(u.digest)
	}
	return f
}

// verify checks the whole blob before its last chunk is sent.
func (u *upload) verify(ctx context.Context, src *source) error {
	if err := src.finish(ctx); err != nil {
		return err
	}
	if u.hash.sum(u.digest.Space(), src.total) != u.digest {
		return fmt.Errorf("%w: the bytes have another hash", cas.ErrMismatch)
	}
	return nil
}

// publish sends the next chunk, if after is not 0 on the condition that this is the sequence of the
// chunk before it.
func (u *upload) publish(ctx context.Context, data []byte, after uint64) error {
	if err := u.await(ctx, uploadWindow-1); err != nil {
		return err
	}
	size := int64(min(len(data), chunkSize))
	for !u.bucket.budget.TryAcquire(size) {
		if len(u.unacked) == 0 {
			if err := u.bucket.budget.Acquire(ctx, size); err != nil {
				return ended(ctx)
			}
			break
		}
		// What this upload holds comes back with its own acknowledgements.
		if err := u.await(ctx, len(u.unacked)-1); err != nil {
			return err
		}
	}
	u.begun = true
	a, err := u.store.bulkWrites.publish(ctx, u.subject(), headerOf(u.sent, data, u.encoder.frames, after), data)
	if err != nil {
		u.bucket.budget.Release(size)
		return err
	}
	u.sent++
	u.unacked = append(u.unacked, sent{ack: a, size: size})
	return nil
}

// await returns when at most n chunks are not acknowledged.
func (u *upload) await(ctx context.Context, n int) error {
	for len(u.unacked) > n {
		sequence, err := u.unacked[0].ack.wait(ctx, u.store.cfg.StallTimeout)
		if err != nil {
			// Even a busy stream ends the upload: it may have stored later chunks, and this one sent
			// again would come behind them. What may still arrive is waited for by abandon.
			return notBusy(err)
		}
		u.bucket.budget.Release(u.unacked[0].size)
		u.unacked = u.unacked[1:]
		if n := len(u.stored); n > 0 && sequence <= u.stored[n-1] {
			return fmt.Errorf("%w: the stream stored chunks out of order", cas.ErrUnavailable)
		}
		u.stored = append(u.stored, sequence)
	}
	return nil
}

// errUncertain reports a commit whose outcome is unknown, so that the chunks must stay.
var errUncertain = errors.New("the broker did not say whether the blob is stored")

// commit stores the metadata. It does not end with ctx, only with the bound of a request, because
// chunks may only be removed when it is known that no metadata names them.
func (u *upload) commit(ctx context.Context) error {
	ctx, cancel := detached(ctx, u.store.cfg.RequestTimeout)
	defer cancel()
	data, err := encodeObject(u.bucket, u.digest, u.nuid, u.form(), u.stored)
	if err != nil {
		return err
	}
	err = u.storeMetadata(ctx, 0, data)
	if !errors.Is(err, errExists) {
		return err
	}
	found, err := u.store.bulk.lastFromLeader(ctx, u.bucket.stream, u.bucket.meta(u.digest))
	if err != nil {
		return err
	}
	if o, err := decodeObject(u.bucket, u.digest, found); err == nil {
		return u.compare(o)
	}
	// Someone deleted or damaged the object; this upload takes its place.
	return u.storeMetadata(ctx, found.sequence, data)
}

func (u *upload) storeMetadata(ctx context.Context, after uint64, data []byte) error {
	return whileBusy(ctx, func() error {
		a, err := u.store.bulkWrites.publish(ctx, u.bucket.meta(u.digest), expect(after), data)
		if errors.Is(err, nats.ErrMaxPayload) {
			return err
		}
		if err != nil {
			return u.resolve(ctx, err)
		}
		defer a.forget()
		_, err = a.wait(ctx, u.store.cfg.RequestTimeout)
		if err == nil || errors.Is(err, errExists) || errors.Is(err, errBusy) || errors.Is(err, cas.ErrFull) {
			return err
		}
		return u.resolve(ctx, err)
	})
}

// resolve finds out whether a metadata message without an acknowledgement was stored.
func (u *upload) resolve(ctx context.Context, cause error) error {
	reading, cancel := detached(ctx, u.store.cfg.RequestTimeout)
	defer cancel()
	var m stored
	err := retry(reading, cleanAttempts, cas.ErrUnavailable, func() (err error) {
		m, err = u.store.bulk.lastFromLeader(reading, u.bucket.stream, u.bucket.meta(u.digest))
		return err
	})
	if err == nil {
		if o, err := decodeObject(u.bucket, u.digest, m); err == nil {
			return u.compare(o)
		}
	}
	return fmt.Errorf("%w: %w: %w", cas.ErrUnavailable, errUncertain, cause)
}

// compare tells whether what is stored is this upload, or else errExists.
func (u *upload) compare(o object) error {
	if o.chunks == u.subject() {
		return nil
	}
	return errExists
}

// abandon removes the chunks. It first waits for those on their way, which would otherwise be
// stored after the purge.
func (u *upload) abandon(ctx context.Context) {
	s := u.store
	cleaning, cancel := detached(ctx, s.cfg.RequestTimeout)
	defer cancel()
	var err error
	for _, c := range u.unacked {
		if _, silence := c.ack.wait(cleaning, s.cfg.RequestTimeout); !c.ack.answered() {
			err = silence
			c.ack.forget()
		}
		u.bucket.budget.Release(c.size)
	}
	u.unacked = nil
	if !u.begun {
		return
	}
	if err := errors.Join(err, u.purge(cleaning)); err != nil {
		u.leave(ctx, err)
	}
}

// purge removes the chunks that are stored.
func (u *upload) purge(ctx context.Context) error {
	return retry(ctx, cleanAttempts, cas.ErrUnavailable, func() error {
		return u.store.bulk.purge(ctx, u.bucket.stream, u.subject())
	})
}

// leave records that the chunks stay although no metadata may name them. They go with the
// generation.
func (u *upload) leave(ctx context.Context, err error) {
	u.store.metrics.orphans.Inc()
	u.store.cfg.Log.WarnContext(ctx, "chunks of an upload are left behind", "stream", u.bucket.stream, "upload", u.nuid, "err", err)
}
