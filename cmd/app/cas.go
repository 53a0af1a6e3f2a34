package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// CAS are the operator's commands for blobs.
type CAS struct {
	Put    CASPut    `cmd:"" help:"Store a file as a blob and print its digest."`
	Get    CASGet    `cmd:"" help:"Read a blob."`
	Stat   CASStat   `cmd:"" help:"Tell what the storage holds, or where a blob is."`
	Ls     CASLs     `cmd:"" help:"List blobs."`
	Tree   CASTree   `cmd:"" help:"Print a directory with all below it."`
	Verify CASVerify `cmd:"" help:"Read blobs again and check them against their digests."`
	GC     CASGC     `cmd:"" name:"gc" help:"Drop what is old now, and not when room is needed."`
}

// CASPut stores a blob.
type CASPut struct {
	blobFlags  `embed:""`
	spaceFlags `embed:""`
	File       string `arg:"" help:"The file, or - for standard input."`
}

func (c *CASPut) run(ctx context.Context, p *process) error {
	space, err := c.space()
	if err != nil {
		return err
	}
	if _, err := c.config(); err != nil {
		return err
	}
	file, err := c.source()
	if err != nil {
		return err
	}
	defer file.Close() //nolint:errcheck // it was only read
	h := space.Function().New()
	n, err := io.Copy(h, file)
	if err != nil {
		return fmt.Errorf("read %s: %w", c.File, err)
	}
	d := space.Sum(h, n)
	return c.withBlobs(ctx, p, func(ctx context.Context, blobs cas.Store) error {
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("read %s: %w", c.File, err)
		}
		err := blobs.Put(ctx, d, file)
		if errors.Is(err, cas.ErrMismatch) {
			return fmt.Errorf("%s changed while it was read; nothing was stored: %w", c.File, err)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(p.out, "%s/%d\n", d.Hash(), d.Size())
		return err
	})
}

// source opens the file. What can be read only once is copied to a file without a name first.
func (c *CASPut) source() (file *os.File, err error) {
	in := os.Stdin
	if c.File != "-" {
		if in, err = os.Open(c.File); err != nil {
			return nil, err
		}
		info, err := in.Stat()
		switch {
		case err != nil:
			return nil, errors.Join(err, in.Close())
		case info.IsDir():
			return nil, errors.Join(run.UsageError{Err: fmt.Errorf("%s is a directory; a blob is one file", c.File)}, in.Close())
		case info.Mode().IsRegular():
			return in, nil
		}
		defer in.Close() //nolint:errcheck // it was only read
	}
	if file, err = os.CreateTemp("", "jetfarm-put-"); err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if _, err = io.Copy(file, in); err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", c.File, err), file.Close())
	}
	return file, nil
}

// CASGet reads a blob.
type CASGet struct {
	blobFlags  `embed:""`
	spaceFlags `embed:""`
	Digest     string `arg:"" help:"HASH/SIZE, HASH, or a resource name as in logs."`
	Output     string `short:"o" help:"File to write, whole or not at all; without it the blob goes to standard output." placeholder:"FILE"`
	Force      bool   `help:"Replace a file that is there."`
}

func (c *CASGet) run(ctx context.Context, p *process) error {
	if err := c.check(c.Digest); err != nil {
		return err
	}
	if _, err := os.Lstat(c.Output); err == nil && c.Output != "" && !c.Force {
		return run.UsageError{Err: fmt.Errorf("%s exists; --force replaces it", c.Output)}
	}
	return c.withBlobs(ctx, p, func(ctx context.Context, blobs cas.Store) error {
		d, err := c.find(ctx, blobs, c.Digest)
		if err != nil {
			return err
		}
		if c.Output == "" || c.Output == "-" {
			out := &counting{w: p.out}
			if err = copyBlob(ctx, blobs, d, out); err != nil && out.n > 0 {
				return fmt.Errorf("the %d bytes on standard output are not the blob: %w", out.n, err)
			}
			return err
		}
		return c.save(ctx, blobs, d)
	})
}

// save writes the blob to a file beside the one that is asked for, which then gets its name.
func (c *CASGet) save(ctx context.Context, s cas.Store, d digest.Digest) error {
	part := filepath.Join(filepath.Dir(c.Output), "."+filepath.Base(c.Output)+"."+strconv.Itoa(os.Getpid())+".part")
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	defer os.Remove(part) //nolint:errcheck // it is gone when all went well
	err = copyBlob(ctx, s, d, f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if c.Force {
		return os.Rename(part, c.Output)
	}
	// Unlike a rename, a link does not replace what somebody else has made meanwhile.
	if err := os.Link(part, c.Output); err != nil {
		return fmt.Errorf("%w (--force replaces a file that is there)", err)
	}
	return nil
}

// copyBlob writes a blob to w and fails if it is not whole.
func copyBlob(ctx context.Context, s cas.Store, d digest.Digest, w io.Writer) error {
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, r.Close())
}

// CASLs lists blobs.
type CASLs struct {
	operatorFlags `embed:""`
	Instance      *string `help:"Only the blobs of this instance name; an empty one is the default instance."`
	Prefix        string  `help:"Only hashes that begin with these hex digits." placeholder:"HEX"`
	Limit         int     `help:"End after this many blobs; 0 lists all." default:"0"`
	JSON          bool    `name:"json" help:"One JSON object a line."`
}

// errLimit ends a listing that is long enough.
var errLimit = errors.New("limit")

// listed is a line of ls --json and the answer of stat --json.
type listed struct {
	Digest     string `json:"digest"`
	Size       int64  `json:"size"`
	Instance   string `json:"instance"`
	Function   string `json:"digest_function"`
	Resource   string `json:"resource"`
	Generation uint32 `json:"generation"`
}

func list(b objectstore.Blob) listed {
	d := b.Digest
	return listed{
		Digest: d.Hash() + "/" + strconv.FormatInt(d.Size(), 10), Size: d.Size(), Instance: d.Space().Instance(),
		Function: d.Space().Function().String(), Resource: d.String(), Generation: b.Generation,
	}
}

func (c *CASLs) validate() error {
	if c.Limit < 0 {
		return run.UsageError{Err: fmt.Errorf("--limit %d is negative", c.Limit)}
	}
	for _, r := range c.Prefix {
		if (r < '0' || r > '9') && (r < 'a' || r > 'f') {
			return run.UsageError{Err: fmt.Errorf("--prefix %s is not lower-case hex", digest.Quote(c.Prefix))}
		}
	}
	return nil
}

func (c *CASLs) run(ctx context.Context, p *process) error {
	if err := c.validate(); err != nil {
		return err
	}
	s, err := c.open(ctx, p)
	if err != nil {
		return err
	}
	defer s.close()
	write := func(b objectstore.Blob) error {
		_, err := fmt.Fprintln(p.out, b.Digest)
		return err
	}
	if encoder := json.NewEncoder(p.out); c.JSON {
		write = func(b objectstore.Blob) error { return encoder.Encode(list(b)) }
	}
	count := 0
	err = s.blobs.Walk(ctx, c.Prefix, func(b objectstore.Blob) error {
		if c.Instance != nil && *c.Instance != b.Digest.Space().Instance() {
			return nil
		}
		if count++; c.Limit > 0 && count > c.Limit {
			return errLimit
		}
		return write(b)
	})
	if errors.Is(err, errLimit) {
		return nil
	}
	return err
}
