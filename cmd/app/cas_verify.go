package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// CASVerify reads blobs and compares them with their digests.
type CASVerify struct {
	operatorFlags `embed:""`
	spaceFlags    `embed:""`
	Digests       []string `arg:"" optional:"" name:"digest" help:"HASH/SIZE, HASH or resource names."`
	All           bool     `help:"Every blob of the farm."`
	Rate          size     `help:"Most bytes that are read in a second, so that builds go on; 0 is no bound." default:"200MiB" placeholder:"SIZE"`
	Quiet         bool     `short:"q" help:"Do not tell the progress."`
}

const (
	// verifyWidth is how many blobs are read at the same time.
	verifyWidth = 4
	// progressEvery is how often the progress is told.
	progressEvery = 2 * time.Second
)

func (c *CASVerify) run(ctx context.Context, p *process) error {
	if c.All == (len(c.Digests) > 0) {
		return run.UsageError{Err: errors.New("name the digests to verify, or --all")}
	}
	if err := c.check(c.Digests...); err != nil {
		return err
	}
	return c.with(ctx, p, func(ctx context.Context, s *storage) error {
		v := &verifier{blobs: s.blobs, out: p.out, rate: int64(c.Rate), began: time.Now()}
		if !c.Quiet {
			v.progress = p.progress
		}
		each := c.named
		if c.All {
			each = func(ctx context.Context, _ *verifier, check func(digest.Digest) error) error {
				return s.blobs.Walk(ctx, "", func(b objectstore.Blob) error { return check(b.Digest) })
			}
		}
		if err := v.run(ctx, each); err != nil {
			return err
		}
		return v.verdict(p.out, c.All)
	})
}

// named gives the digests of the command line to check.
func (c *CASVerify) named(ctx context.Context, v *verifier, check func(digest.Digest) error) error {
	for _, text := range c.Digests {
		d, err := c.find(ctx, v.blobs, text)
		switch {
		case errors.Is(err, cas.ErrNotFound):
			v.count(text, 0, err)
			continue
		case err == nil:
			err = check(d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// verifier counts what it finds.
type verifier struct {
	blobs    cas.Store
	out      io.Writer
	progress io.Writer // nil for none
	rate     int64
	began    time.Time

	mu                  sync.Mutex // guards all below, and out
	good, damaged, gone int
	bytes               int64
	told                time.Time
	unwritten           error
}

// run checks what each gives to check.
func (v *verifier) run(ctx context.Context, each func(ctx context.Context, v *verifier, check func(digest.Digest) error) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(verifyWidth + 1)
	group.Go(func() error {
		return each(ctx, v, func(d digest.Digest) error {
			if err := v.wait(ctx); err != nil {
				return err
			}
			group.Go(func() error { return v.check(ctx, d) })
			return nil
		})
	})
	return group.Wait()
}

// wait keeps the rate: it returns when what was read so far may have been read.
func (v *verifier) wait(ctx context.Context) error {
	v.mu.Lock()
	due := time.Duration(0)
	if v.rate > 0 {
		due = time.Duration(float64(v.bytes) / float64(v.rate) * float64(time.Second))
	}
	v.mu.Unlock()
	timer := time.NewTimer(max(0, due-time.Since(v.began)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// check reads one blob. The store drops a damaged one.
func (v *verifier) check(ctx context.Context, d digest.Digest) error {
	out := &counting{w: io.Discard}
	err := copyBlob(ctx, v.blobs, d, out)
	if err != nil && !errors.Is(err, cas.ErrMismatch) && !errors.Is(err, cas.ErrNotFound) {
		return fmt.Errorf("verify %v: %w", d, err)
	}
	v.count(d.String(), out.n, err)
	return nil
}

// count enters the outcome for one blob and tells what is wrong with it.
func (v *verifier) count(name string, n int64, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.bytes += n
	var failed error
	switch {
	case err == nil:
		v.good++
	case errors.Is(err, cas.ErrMismatch):
		v.damaged++
		_, failed = fmt.Fprintf(v.out, "damaged %s\n", name)
	default:
		v.gone++
		_, failed = fmt.Fprintf(v.out, "absent %s\n", name)
	}
	v.unwritten = errors.Join(v.unwritten, failed)
	if v.progress != nil && time.Since(v.told) >= progressEvery {
		if !v.told.IsZero() {
			fmt.Fprintf(v.progress, "verified %s\n", v.sum())
		}
		v.told = time.Now()
	}
}

func (v *verifier) sum() string {
	return fmt.Sprintf("%s blobs of %s; %d damaged, %d absent", humanize.Comma(int64(v.good)), bytesText(uint64(v.bytes)), v.damaged, v.gone) //nolint:gosec // not negative
}

// verdict prints the sum and fails if a blob was not as it should be. In a walk over all, blobs may
// have been evicted on the way.
func (v *verifier) verdict(out io.Writer, all bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, err := fmt.Fprintf(out, "verified %s\n", v.sum()); err != nil || v.unwritten != nil {
		return errors.Join(err, v.unwritten)
	}
	switch {
	case v.damaged > 0:
		return fmt.Errorf("%d blobs were damaged and are dropped; clients upload them again. Look for errors of the broker's disk", v.damaged)
	case v.gone > 0 && !all:
		return fmt.Errorf("%d blobs are absent", v.gone)
	}
	return nil
}
