package unpack

import (
	"archive/tar"
	"archive/zip"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/frontend/spool"
)

const (
	// tarMagic is at tarMagicAt in the first block of a tar.
	tarMagic   = "ustar"
	tarMagicAt = 257
	tarBlock   = 512
	// maxWindow bounds the memory of a zstd decoder.
	maxWindow = 64 << 20
	// maxIndex bounds the directory of a zip, which is read into memory.
	maxIndex = 32 << 20
)

// read unpacks an archive, whose kind its first bytes tell.
func (u *unpacker) read(archive *spool.File) error {
	if head, err := bufio.NewReader(archive.Reader()).Peek(4); err == nil && (string(head) == "PK\x03\x04" || string(head) == "PK\x05\x06") {
		return u.zip(archive)
	}
	r := bufio.NewReaderSize(archive.Reader(), 64<<10)
	plain, err := decompressed(r)
	if err != nil {
		return err
	}
	defer plain.Close() //nolint:errcheck // only frees memory
	// Headers and padding count as well: an archive of nothing else must end too.
	const overhead = 4
	limit := u.cfg.Limits.Bytes + int64(u.cfg.Limits.Entries)*overhead*tarBlock
	in := bufio.NewReaderSize(&bounded{ctx: u.ctx, source: plain, left: limit}, 64<<10)
	first, err := in.Peek(tarBlock)
	if err != nil && !errors.Is(err, io.EOF) {
		return damaged(err)
	}
	if len(first) < tarBlock || (string(first[tarMagicAt:tarMagicAt+len(tarMagic)]) != tarMagic && !bytes.Equal(first, make([]byte, tarBlock))) {
		return fmt.Errorf("%w: it is neither a tar (plain or compressed by gzip, zstd or bzip2) nor a zip", ErrInvalid)
	}
	return u.tar(tar.NewReader(in))
}

// decompressed returns what is in r, by its first bytes.
func decompressed(r *bufio.Reader) (io.ReadCloser, error) {
	head, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, damaged(err)
		}
		return z, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, damaged(err)
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(r)), nil
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return nil, fmt.Errorf("%w: it is compressed by xz, which is not supported (supported: gzip, zstd, bzip2)", ErrInvalid)
	}
	return io.NopCloser(r), nil
}

// tar adds the entries of a tar.
func (u *unpacker) tar(t *tar.Reader) error {
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return damaged(err)
		}
		if err := u.tarEntry(h, t); err != nil {
			return err
		}
	}
}

func (u *unpacker) tarEntry(h *tar.Header, content io.Reader) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return u.tree.grow()
	case tar.TypeDir:
		return u.tree.addDirectory(h.Name)
	case tar.TypeSymlink:
		return u.tree.addLink(h.Name, h.Linkname)
	case tar.TypeLink:
		return u.tree.addHardLink(h.Name, h.Linkname)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		n, err := u.file(h.Name, damagedReader{content}, h.Size, h.Mode&0o111 != 0)
		if err != nil {
			return err
		}
		return u.tree.add(h.Name, n)
	}
	return fmt.Errorf("%w: %s is a special file of type %q", ErrInvalid, digest.Quote(h.Name), h.Typeflag)
}

// zip adds the entries of a zip.
func (u *unpacker) zip(archive *spool.File) error {
	in := &boundedAt{source: archive}
	in.left.Store(maxIndex)
	z, err := zip.NewReader(in, archive.Size())
	if err != nil {
		return damaged(err)
	}
	in.left.Store(-1)
	for _, f := range z.File {
		if err := u.zipEntry(f); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) zipEntry(f *zip.File) error {
	const encrypted = 1
	switch {
	case f.Flags&encrypted != 0:
		return fmt.Errorf("%w: %s is encrypted", ErrInvalid, digest.Quote(f.Name))
	case strings.Contains(f.Name, `\`):
		return fmt.Errorf("%w: %s has a backslash, which some take for a slash", ErrInvalid, digest.Quote(f.Name))
	case f.Mode().IsDir():
		return u.tree.addDirectory(f.Name)
	case f.Mode().Type()&^fs.ModeSymlink != 0:
		return fmt.Errorf("%w: %s is a special file", ErrInvalid, digest.Quote(f.Name))
	case f.UncompressedSize64 > uint64(u.left): //nolint:gosec // not negative
		return fmt.Errorf("%w: it has more than %d bytes unpacked", ErrTooLarge, u.cfg.Limits.Bytes)
	}
	content, err := f.Open()
	if err != nil {
		return damaged(err)
	}
	defer content.Close() //nolint:errcheck // it was read to its end, or has failed already
	in := damagedReader{&bounded{ctx: u.ctx, source: content, left: u.left + 1}}
	if f.Mode().Type() == fs.ModeSymlink {
		target, err := io.ReadAll(io.LimitReader(in, maxTarget+1))
		if err != nil {
			return err
		}
		return u.tree.addLink(f.Name, string(target))
	}
	n, err := u.file(f.Name, in, int64(f.UncompressedSize64), f.Mode()&0o111 != 0) //nolint:gosec // bounded above
	if err != nil {
		return err
	}
	return u.tree.add(f.Name, n)
}

// damaged is the error of a decoder.
func damaged(err error) error {
	for _, ours := range []error{ErrInvalid, ErrTooLarge, spool.ErrFull, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, ours) {
			return err
		}
	}
	if errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	return fmt.Errorf("%w: %w", ErrInvalid, err)
}

// damagedReader makes the errors of a decoder errors of this package.
type damagedReader struct{ io.Reader }

func (r damagedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = damaged(err)
	}
	return n, err
}

// bounded is a reader that ends with an error after left bytes, or with ctx.
type bounded struct {
	ctx    context.Context //nolint:containedctx // it lives as long as one call of Archive
	source io.Reader
	left   int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	n, err := b.source.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("%w: it goes on and on", ErrTooLarge)
	}
	return n, err
}

// boundedAt is a file of which at most left bytes may be read, unless left is negative.
type boundedAt struct {
	source io.ReaderAt
	left   atomic.Int64
}

func (b *boundedAt) ReadAt(p []byte, offset int64) (int, error) {
	if b.left.Load() < 0 {
		return b.source.ReadAt(p, offset)
	}
	n, err := b.source.ReadAt(p, offset)
	if b.left.Add(-int64(n)) < 0 {
		b.left.Store(0)
		return 0, fmt.Errorf("%w: its index has more than %d bytes", ErrTooLarge, int64(maxIndex))
	}
	return n, err
}
