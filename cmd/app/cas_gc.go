package app

import (
	"context"
	"fmt"
	"io"

	"github.com/dustin/go-humanize"

	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// CASGC drops what is old.
type CASGC struct {
	operatorFlags `embed:""`
	To            size `help:"Go on until the blobs have at most this many bytes, or nothing more is old." placeholder:"SIZE"`
}

// maxCollections bounds how often gc asks for a collection: each drops a generation or is the last.
const maxCollections = 100

func (c *CASGC) run(ctx context.Context, p *process) error {
	return c.with(ctx, p, func(ctx context.Context, s *storage) error {
		return c.collect(ctx, p.out, s.blobs)
	})
}

func (c *CASGC) collect(ctx context.Context, out io.Writer, blobs *objectstore.Store) error {
	before, err := blobs.Usage(ctx)
	if err != nil {
		return err
	}
	after := before
	for i := 0; i < maxCollections && (i == 0 || after.Bytes > int64(c.To)); i++ {
		last := after.Bytes
		if err := blobs.Collect(ctx); err != nil {
			return fmt.Errorf("%w; it is 'jetfarm up' and frontends that collect", err)
		}
		if after, err = blobs.Usage(ctx); err != nil {
			return err
		}
		if c.To == 0 || after.Bytes >= last {
			break
		}
	}
	_, err = fmt.Fprintf(out, "before: %s in %s blobs\nafter:  %s in %s blobs\n",
		bytesText(uint64(before.Bytes)), humanize.Comma(before.Blobs), bytesText(uint64(after.Bytes)), humanize.Comma(after.Blobs)) //nolint:gosec // not negative
	if err == nil && c.To > 0 && after.Bytes > int64(c.To) {
		return fmt.Errorf("%s are left, since nothing more is old: what was used within the retention stays. A smaller --cas-size makes less count as young", bytesText(uint64(after.Bytes))) //nolint:gosec // not negative
	}
	return err
}
