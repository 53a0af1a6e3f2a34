package objectstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// sweepParts is how often within Config.OrphanAge chunks that nobody needs are looked for.
const sweepParts = 6

// clean removes chunks of uploads that broke off, again and again until ctx ends, while this process is
// the rotator.
func (s *Store) clean(ctx context.Context) error {
	for {
		if err := pause(ctx, s.cfg.OrphanAge/sweepParts); err != nil {
			return err
		}
		if s.known().Holder != s.name {
			continue
		}
		if err := s.sweepAll(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Log.WarnContext(ctx, "chunks of uploads that broke off cannot be removed now", "err", err)
		}
	}
}

func (s *Store) sweepAll(ctx context.Context) error {
	for _, g := range s.generations() {
		for _, b := range g.buckets() {
			if b.family != large {
				continue
			}
			if err := s.sweep(ctx, b); err != nil {
				return fmt.Errorf("stream %s: %w", b.stream, err)
			}
		}
	}
	return nil
}

// sweep removes the chunks of a stream that no metadata names and that were followed by none for
// Config.OrphanAge. An upload that goes on later finds that nothing of it was kept.
func (s *Store) sweep(ctx context.Context, b *bucket) error {
	uploads := make(map[digest.Digest][]attempt)
	err := s.bulk.counts(ctx, b.stream, b.chunks+">", func(subject string, n uint64) {
		if d, ok := parseUpload(strings.TrimPrefix(subject, b.chunks)); ok {
			uploads[d] = append(uploads[d], attempt{bucket: b, subject: subject, chunks: int(min(n, maxChunks))})
		}
	})
	if err != nil {
		return err
	}
	complete := make(map[string]struct{})
	err = s.bulk.subjects(ctx, b.stream, b.metas+">", func(subject string) { complete[subject] = struct{}{} })
	if err != nil {
		return err
	}
	for d, attempts := range uploads {
		if _, ok := complete[b.meta(d)]; ok && len(attempts) == 1 {
			continue
		}
		if err := s.sweepBlob(ctx, b, d, attempts); err != nil {
			return err
		}
	}
	return nil
}

// sweepBlob removes the attempts of one blob that were in vain.
func (s *Store) sweepBlob(ctx context.Context, b *bucket, d digest.Digest, attempts []attempt) error {
	named := ""
	o, err := s.findObject(ctx, b, d, true)
	switch {
	case err == nil:
		named = o.chunks
	case !errors.Is(err, cas.ErrNotFound):
		return err
	}
	for _, a := range attempts {
		if a.subject == named {
			continue
		}
		last, err := s.bulk.lastFromLeader(ctx, b.stream, a.subject)
		if errors.Is(err, cas.ErrNotFound) || (err == nil && time.Since(last.time) < s.cfg.OrphanAge) {
			continue
		}
		if err == nil && !isChunk(last.header, chunksOf(d)-1) {
			err = s.stop(ctx, d, a)
		} else if err == nil {
			err = s.bulk.purge(ctx, b.stream, a.subject)
		}
		if err != nil {
			return err
		}
		s.metrics.purged.Inc()
		s.cfg.Log.InfoContext(ctx, "chunks of an upload that broke off are removed", "stream", b.stream, "blob", d.String(), "last", last.time)
	}
	return nil
}

// parseUpload returns the blob of which an upload is, from the end of the subject of its chunks.
func parseUpload(end string) (digest.Digest, bool) {
	parts := strings.SplitN(end, ".", 4)
	if len(parts) != 4 {
		return digest.Digest{}, false
	}
	return parseChunk(strings.Join(parts[:3], "."))
}
