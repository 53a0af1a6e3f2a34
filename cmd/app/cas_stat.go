package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
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
	Bytes       uint64            `json:"bytes"`
	Blobs       int               `json:"blobs"`
	Generations []generationUsage `json:"generations"`
	Results     *resultUsage      `json:"action_results,omitempty"`
}

type generationUsage struct {
	Number  uint32    `json:"number"`
	Created time.Time `json:"created"`
	Bytes   uint64    `json:"bytes"`
	Blobs   int       `json:"blobs"`
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
	u := new(usage)
	byNumber := make(map[uint32]*generationUsage)
	for number, blobs := range s.blobs.Counts() {
		byNumber[number] = &generationUsage{Number: number, Blobs: blobs}
		u.Blobs += blobs
	}
	streams := s.js.ListStreams(ctx)
	for info := range streams.Info() {
		number, ok := objectstore.GenerationOf(info.Config.Name)
		g := byNumber[number]
		switch {
		case info.Config.Name == actionStream:
			u.Results = &resultUsage{Bytes: info.State.Bytes, Limit: info.Config.MaxBytes, Entries: info.State.Msgs}
		case ok && g != nil:
			g.Bytes += info.State.Bytes
			u.Bytes += info.State.Bytes
			if g.Created.IsZero() || info.Created.Before(g.Created) {
				g.Created = info.Created
			}
		}
	}
	if err := streams.Err(); err != nil && !errors.Is(err, jetstream.ErrEndOfData) {
		return nil, fmt.Errorf("list the streams: %w", err)
	}
	for _, number := range slices.Backward(slices.Sorted(maps.Keys(byNumber))) {
		u.Generations = append(u.Generations, *byNumber[number])
	}
	return u, nil
}

func (u *usage) print(out io.Writer, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }
	row("blobs", humanize.Comma(int64(u.Blobs)), bytesText(u.Bytes), "")
	for i, g := range u.Generations {
		age := now.Sub(g.Created).Round(time.Second).String() + " old"
		if i == 0 {
			age += ", written to"
		}
		row("  generation "+strconv.FormatUint(uint64(g.Number), 10), humanize.Comma(int64(g.Blobs)), bytesText(g.Bytes), age)
	}
	if r := u.Results; r != nil {
		limit := "no limit"
		if r.Limit > 0 {
			limit = "of " + bytesText(uint64(r.Limit))
		}
		row("action results", humanize.Comma(int64(r.Entries)), bytesText(r.Bytes), limit) //nolint:gosec // a count
	}
	return w.Flush()
}

func bytesText(n uint64) string { return humanize.IBytes(n) }
