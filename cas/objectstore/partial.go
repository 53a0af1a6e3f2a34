package objectstore

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

var _ cas.Resumer = (*Store)(nil)

// The beginning of an upload that broke off is the chunks under its subject, which no metadata names.
// Whatever asks for it later, in any process, finds it by the subject, which has a token of the
// client's name for the upload before the one that is its own. Going on means to copy what is kept to
// a subject of its own: attempts never share a subject, so those with the same name cannot mix their
// bytes.
//
// Chunks are only purged when no metadata can name them any more:
//   - by the attempt that wrote them, before it stores metadata;
//   - those of an attempt that lacks chunks, after a message in its subject that expects the last one
//     to be what it was when it was looked at. Every attempt sends its last chunk on the condition that
//     the one before it is the last message of the subject, so it fails from then on;
//   - in a stream that has metadata of the blob, which is where the attempt's own would be refused.
//
// An attempt that has all chunks and no metadata may be about to store that. It is left alone until it
// has been idle for much longer than that takes: the bound of a request and a few retries.
//
// The sweep may remove what has been idle for an hour. It is sure that a slow upload then fails in
// place of storing metadata if it goes through stop for attempts that lack chunks.
//
// The rejected alternative, appending to the subject that is there, needs no copy, but every chunk must
// wait for the one before it so that two of the same name do not mix.

// maxAttempts is how many attempts of one upload are kept.
const maxAttempts = 3

// noUpload is the token of uploads without a name, which are not kept.
const noUpload = "-"

// uploadToken is a client's name for an upload as a subject token.
func uploadToken(upload string) string {
	if upload == "" {
		return noUpload
	}
	sum := sha256.Sum256([]byte(upload))
	return base64.RawURLEncoding.EncodeToString(sum[:12])
}

// attempt is the chunks of an upload that broke off or goes on.
type attempt struct {
	bucket  *bucket
	subject string
	chunks  int
}

// bytes is how much of the blob an attempt has.
func (a attempt) bytes(d digest.Digest) int64 {
	return min(int64(a.chunks)*chunkSize, d.Size())
}

// attempts finds the attempts of an upload, the longest first. The broker answers from memory.
func (s *Store) attempts(ctx context.Context, d digest.Digest, token string, in []*bucket) ([]attempt, error) {
	var found []attempt
	for _, b := range in {
		err := s.bulk.counts(ctx, b.stream, b.chunks+tail(d)+"."+token+".*", func(subject string, n uint64) {
			found = append(found, attempt{bucket: b, subject: subject, chunks: int(min(n, maxChunks))})
		})
		if err != nil && !s.isDropped(ctx, b) {
			return nil, err
		}
	}
	slices.SortFunc(found, func(a, b attempt) int { return cmp.Compare(b.chunks, a.chunks) })
	return found, nil
}

// largeBuckets returns where attempts for a blob can be.
func (s *Store) largeBuckets(d digest.Digest) []*bucket {
	var out []*bucket
	for _, g := range s.generations() {
		if b := g.bucket(d); b != nil {
			out = append(out, b)
		}
	}
	return out
}

// Committed returns how much of an upload is kept, see cas.Resumer. Blobs of one chunk are not kept.
func (s *Store) Committed(ctx context.Context, d digest.Digest, upload string) (int64, error) {
	if ctx.Err() != nil {
		return 0, fmt.Errorf("look for an upload of %v: %w", d, ended(ctx))
	}
	if there, err := s.present(ctx, d); err != nil {
		return 0, fmt.Errorf("look for an upload of %v: %w", d, err)
	} else if there {
		return d.Size(), nil
	}
	if upload == "" || d.IsImpossible() || familyOf(d) == small {
		return 0, nil
	}
	found, err := s.attempts(ctx, d, uploadToken(upload), s.largeBuckets(d))
	if err != nil {
		s.suspect(err)
		return 0, fmt.Errorf("look for an upload of %v: %w", d, err)
	}
	if len(found) == 0 {
		return 0, nil
	}
	return found[0].bytes(d), nil
}

// PutFrom stores a blob of which a part is kept, see cas.Resumer.
func (s *Store) PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	return s.counted(d, s.putFrom(ctx, d, upload, offset, r))
}

func (s *Store) putFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	if offset == 0 {
		return s.put(ctx, d, uploadToken(upload), r)
	}
	if ctx.Err() != nil {
		return ended(ctx)
	}
	if there, err := s.present(ctx, d); err != nil || there {
		return err
	}
	if offset < 0 || offset > d.Size() || upload == "" || d.IsImpossible() || familyOf(d) == small {
		return fmt.Errorf("%w: %d bytes", cas.ErrNotKept, offset)
	}
	token := uploadToken(upload)
	found, err := s.attempts(ctx, d, token, s.largeBuckets(d))
	if err != nil {
		return err
	}
	found = slices.DeleteFunc(found, func(a attempt) bool { return a.bytes(d) < offset })
	if len(found) == 0 {
		return fmt.Errorf("%w: %d bytes", cas.ErrNotKept, offset)
	}
	source, err := s.oldest(ctx, found)
	if err != nil {
		return err
	}
	kept, err := s.openAttempt(ctx, d, source, offset)
	if err != nil {
		return err
	}
	err = s.put(ctx, d, token, io.MultiReader(kept, r))
	if err == nil {
		s.drop(ctx, d, []attempt{source}, func(attempt) bool { return false }) // it may be in an older generation
	}
	if e := kept.Close(); e != nil && !s.cfg.Bulk.IsClosed() {
		s.cfg.Log.WarnContext(ctx, "close the kept part of an upload", "err", e)
	}
	return err
}

// oldest returns the attempt that began first. It is the one that the client knows of; a later one may
// be another client's of the same name that goes on, whose bytes may be wrong.
func (s *Store) oldest(ctx context.Context, of []attempt) (attempt, error) {
	found, began := of[0], stored{}
	for _, a := range of {
		if len(of) == 1 {
			break
		}
		m, err := s.bulk.nextFromLeader(ctx, a.bucket.stream, a.subject, 1)
		if errors.Is(err, cas.ErrNotFound) {
			continue
		}
		if err != nil {
			return attempt{}, err
		}
		if began.sequence == 0 || m.time.Before(began.time) {
			found, began = a, m
		}
	}
	return found, nil
}

// openAttempt returns a reader of the first bytes of an attempt. It ends with cas.ErrNotKept in place
// of chunks that are lost or damaged, after which the attempt is none any more.
func (s *Store) openAttempt(ctx context.Context, d digest.Digest, a attempt, size int64) (io.ReadCloser, error) {
	r, err := s.newLargeReader(ctx, a.bucket, d, object{chunks: a.subject})
	if err != nil {
		return nil, err
	}
	r.chunks, r.left = int((size+chunkSize-1)/chunkSize), size
	r.discard = func(how string) error {
		s.drop(ctx, d, []attempt{a}, func(a attempt) bool { return a.chunks >= chunksOf(d) })
		return fmt.Errorf("%w: %s", cas.ErrNotKept, how)
	}
	if err := r.start(0); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// drop removes attempts that are not wanted any more, unless they go on. Those that have all chunks
// are removed only if useless says that no metadata will name them. What it cannot remove stays for
// the sweep.
func (s *Store) drop(ctx context.Context, d digest.Digest, unwanted []attempt, useless func(attempt) bool) {
	cleaning, cancel := detached(ctx, s.cfg.RequestTimeout)
	defer cancel()
	var group errgroup.Group
	for _, a := range unwanted {
		group.Go(func() error {
			if useless(a) {
				return s.bulk.purge(cleaning, a.bucket.stream, a.subject)
			}
			if a.chunks >= chunksOf(d) {
				return nil
			}
			return s.stop(cleaning, d, a)
		})
	}
	if err := group.Wait(); err != nil {
		s.cfg.Log.WarnContext(ctx, "parts of an upload are left behind", "blob", d.String(), "err", err)
	}
}

// stop removes an attempt that lacks chunks so that it can never become a blob, unless it goes on or
// has got its last chunk meanwhile.
func (s *Store) stop(ctx context.Context, d digest.Digest, a attempt) error {
	m, err := s.bulk.lastFromLeader(ctx, a.bucket.stream, a.subject)
	if errors.Is(err, cas.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if isChunk(m.header, chunksOf(d)-1) {
		return nil
	}
	fence, err := s.bulkWrites.publish(ctx, a.subject, expect(m.sequence), nil)
	if err != nil {
		return err
	}
	defer fence.forget()
	switch _, err := fence.wait(ctx, s.cfg.RequestTimeout); {
	case errors.Is(err, errExists), errors.Is(err, errBusy):
		return nil // it goes on
	case err != nil:
		return err
	}
	return s.bulk.purge(ctx, a.bucket.stream, a.subject)
}

// keep leaves the chunks of an upload that broke off, so that a later one can go on. When there are
// too many attempts it is not kept, or in favor of it the shortest are not.
func (u *upload) keep(ctx context.Context) {
	s := u.store
	cleaning, cancel := detached(ctx, s.cfg.RequestTimeout)
	defer cancel()
	whole := true
	for _, c := range u.unacked {
		sequence, err := c.ack.wait(cleaning, s.cfg.RequestTimeout)
		switch {
		case err != nil:
			whole = false
		case whole:
			u.stored = append(u.stored, sequence)
		default:
			// One before it is lost: what is kept must not have a gap.
			if err := s.bulk.delete(cleaning, u.bucket.stream, sequence); err != nil {
				s.cfg.Log.WarnContext(ctx, "a chunk of an upload is left behind", "stream", u.bucket.stream, "sequence", sequence, "err", err)
			}
		}
		c.ack.forget()
		u.bucket.budget.Release(c.size)
	}
	u.unacked = nil
	if !u.begun {
		return
	}
	found, err := s.attempts(cleaning, u.digest, u.token, s.largeBuckets(u.digest))
	if err != nil {
		return // the next one that breaks off will see to it
	}
	if len(found) <= maxAttempts {
		return
	}
	if found[0].subject != u.subject() {
		if err := u.purge(cleaning); err != nil {
			u.leave(ctx, err)
		}
		return
	}
	s.drop(ctx, u.digest, found[maxAttempts:], func(attempt) bool { return false })
}

// clear removes what is kept of the blob once it is stored, whatever the uploads are called: nobody
// needs to go on with them.
func (u *upload) clear(ctx context.Context) {
	if u.token != noUpload { // who names uploads keeps some
		u.dropOthers(ctx, "*", []*bucket{u.bucket}, func(attempt) bool { return true })
	}
}

// disown removes what is kept of an upload that turned out to be of other bytes.
func (u *upload) disown(ctx context.Context) {
	if u.token != noUpload {
		u.dropOthers(ctx, u.token, u.store.largeBuckets(u.digest), func(attempt) bool { return false })
	}
}

func (u *upload) dropOthers(ctx context.Context, token string, in []*bucket, useless func(attempt) bool) {
	cleaning, cancel := detached(ctx, u.store.cfg.RequestTimeout)
	defer cancel()
	found, err := u.store.attempts(cleaning, u.digest, token, in)
	if err != nil {
		return // it stays for the sweep
	}
	found = slices.DeleteFunc(found, func(a attempt) bool { return a.subject == u.subject() })
	u.store.drop(ctx, u.digest, found, useless)
}
