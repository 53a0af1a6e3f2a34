package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// CASStat tells what is stored.
type CASStat struct {
	blobFlags  `embed:""`
	spaceFlags `embed:""`
	Digest     string `arg:"" optional:"" help:"HASH/SIZE, HASH or a resource name; without one, the whole storage."`
	JSON       bool   `name:"json" help:"One JSON object."`
}

// usage is what the storage of a farm holds.
type usage struct {
	Bytes       int64             `json:"bytes"`
	Limit       int64             `json:"limit"` // 0 for none
	Blobs       int64             `json:"blobs"`
	Full        string            `json:"full,omitempty"` // why nothing can be stored
	Generations []generationUsage `json:"generations"`    // newest first
	Results     *resultUsage      `json:"action_results,omitempty"`
}

type generationUsage struct {
	Number  uint32    `json:"number"`
	Created time.Time `json:"created"`
	Bytes   int64     `json:"bytes"`
	Blobs   int64     `json:"blobs"`
	State   string    `json:"state"`
}

type resultUsage struct {
	Bytes   uint64 `json:"bytes"`
	Limit   int64  `json:"limit"`
	Entries uint64 `json:"entries"`
}

func (c *CASStat) run(ctx context.Context, p *process) error {
	if c.Digest != "" {
		if err := c.check(c.Digest); err != nil {
			return err
		}
	}
	if c.Remote != "" {
		return c.remote(ctx, p)
	}
	s, err := c.open(ctx, p)
	if err != nil {
		return err
	}
	defer s.close()
	if c.Digest != "" {
		return c.blob(ctx, p.out, s)
	}
	u, err := s.usage(ctx)
	if err != nil {
		return err
	}
	if c.JSON {
		return json.NewEncoder(p.out).Encode(u)
	}
	return u.print(p.out, time.Now())
}

// remote tells what can be known of a blob from outside.
func (c *CASStat) remote(ctx context.Context, p *process) error {
	if c.Digest == "" {
		return run.UsageError{Err: errors.New("--remote tells of one blob only; name its digest")}
	}
	return c.withBlobs(ctx, p, func(ctx context.Context, blobs cas.Store) error {
		d, err := c.find(ctx, blobs, c.Digest)
		if err != nil {
			return err
		}
		if err := present(ctx, blobs, d); err != nil {
			return err
		}
		if c.JSON {
			return json.NewEncoder(p.out).Encode(list(objectstore.Blob{Digest: d}))
		}
		_, err = fmt.Fprintf(p.out, "%v\npresent, %s\n", d, bytesText(uint64(d.Size()))) //nolint:gosec // not negative
		return err
	})
}

func (c *CASStat) blob(ctx context.Context, out io.Writer, s *storage) error {
	d, err := c.find(ctx, s.blobs, c.Digest)
	if err != nil {
		return err
	}
	b, err := s.blobs.Stat(ctx, d)
	if err != nil {
		return err
	}
	if c.JSON {
		return json.NewEncoder(out).Encode(list(b))
	}
	where := "generation " + strconv.FormatUint(uint64(b.Generation), 10) + ", stream " + b.Stream
	if b.Stream == "" {
		where = "nowhere: the empty blob is always present"
	}
	_, err = fmt.Fprintf(out, "%v\npresent, %s, in %s\n", d, bytesText(uint64(d.Size())), where) //nolint:gosec // not negative
	return err
}

// usage asks the broker for the streams of the storage.
func (s *storage) usage(ctx context.Context) (*usage, error) {
	blobs, err := s.blobs.Usage(ctx)
	if err != nil {
		return nil, err
	}
	u := &usage{Bytes: blobs.Bytes, Limit: blobs.Limit, Blobs: blobs.Blobs, Full: blobs.Full}
	for i, g := range slices.Backward(blobs.Generations) {
		state := "young"
		switch {
		case i == len(blobs.Generations)-1:
			state = "written to"
		case g.Old:
			state = "old: what is used is copied before it is reported present"
		case g.Aging:
			state = "aging: what is used is copied"
		}
		u.Generations = append(u.Generations, generationUsage{Number: g.Number, Created: g.Created, Bytes: g.Bytes, Blobs: g.Blobs, State: state})
	}
	results, err := s.js.Stream(ctx, actionStream)
	switch {
	case err == nil:
		info := results.CachedInfo()
		u.Results = &resultUsage{Bytes: info.State.Bytes, Limit: info.Config.MaxBytes, Entries: info.State.Msgs}
	case !errors.Is(err, jetstream.ErrStreamNotFound):
		return nil, fmt.Errorf("stream %s: %w", actionStream, err)
	}
	return u, nil
}

func (u *usage) print(out io.Writer, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }
	row("blobs", humanize.Comma(u.Blobs), bytesText(uint64(u.Bytes)), limitText(u.Limit)) //nolint:gosec // not negative
	for _, g := range u.Generations {
		age := now.Sub(g.Created).Round(time.Second).String() + " old, " + g.State
		row("  generation "+strconv.FormatUint(uint64(g.Number), 10), humanize.Comma(g.Blobs), bytesText(uint64(g.Bytes)), age) //nolint:gosec // not negative
	}
	if r := u.Results; r != nil {
		row("action results", humanize.Comma(int64(r.Entries)), bytesText(r.Bytes), limitText(r.Limit)) //nolint:gosec // a count
	}
	if u.Full != "" {
		row("FULL", u.Full)
	}
	return w.Flush()
}

func limitText(limit int64) string {
	if limit <= 0 {
		return "without a limit"
	}
	return "of " + bytesText(uint64(limit))
}

func bytesText(n uint64) string { return humanize.IBytes(n) }
