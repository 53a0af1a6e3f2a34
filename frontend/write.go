package frontend

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Write stores a blob. The response comes at once when the blob is already there (rows WR-17, WR-18),
// else after finish_write and the whole blob being durable. An upload that breaks off can go on at
// another frontend where the store keeps its beginning: nothing about it is remembered here.
func (b *byteStream) Write(stream bytestream.ByteStream_WriteServer) error {
	up := &upload{stream: stream, noData: b.limits.NoData}
	defer up.close()
	first, err := up.begin()
	if err != nil {
		return err
	}
	ctx := stream.Context()
	w, err := b.target(ctx, first.name)
	if err != nil {
		return err
	}
	if err := b.uploads.take(); err != nil {
		return err
	}
	defer b.uploads.release()
	committed, err := b.store(ctx, w, up)
	b.metrics.received.WithLabelValues("bytestream").Add(float64(up.received))
	if err != nil {
		return err
	}
	return stream.SendAndClose(&bytestream.WriteResponse{CommittedSize: committed})
}

// target returns what the first message of an upload is for.
func (b *byteStream) target(ctx context.Context, name string) (digest.Write, error) {
	if name == "" {
		return digest.Write{}, fmt.Errorf("%w: the first message has no resource_name", errInvalid)
	}
	if err := checkResourceHeader(ctx, name); err != nil {
		return digest.Write{}, err
	}
	w, err := digest.ParseWrite(name)
	if err != nil {
		return digest.Write{}, err
	}
	if w.Digest.Size() > b.limits.MaxBlobBytes {
		return digest.Write{}, fmt.Errorf("%w: blob %v is larger than %d bytes, the most that is stored", errInvalid, w.Digest, b.limits.MaxBlobBytes)
	}
	if w.Digest.IsImpossible() {
		return digest.Write{}, fmt.Errorf("%w: no blob can have the digest %v", errInvalid, w.Digest)
	}
	return w, nil
}

// store puts the blob of an upload and returns the committed_size of its end.
func (b *byteStream) store(ctx context.Context, w digest.Write, up *upload) (int64, error) {
	up.present = func() error { return b.present(ctx, w.Digest) }
	err := b.put(ctx, w, up)
	switch {
	case errors.Is(err, errHalfClosed):
		return b.committed(ctx, w)
	case err != nil && !errors.Is(err, errPresent):
		return 0, err
	case w.Compressor == digest.Identity:
		return w.Digest.Size(), nil
	case up.ended:
		return up.received, nil // decision D9
	}
	return notRead, nil
}

// notRead is the committed_size of a compressed upload that was answered early (row WR-17).
const notRead = -1

// put stores the blob. That it is there already may be errPresent or no error.
func (b *byteStream) put(ctx context.Context, w digest.Write, up *upload) error {
	offset, err := b.offset(ctx, w, up)
	if err != nil {
		return err
	}
	if w.Compressor == digest.Zstd {
		return b.putCompressed(ctx, w.Digest, up)
	}
	if err := up.start(offset, w.Digest.Size()); err != nil {
		return err
	}
	return cas.PutFrom(ctx, b.blobs, w.Digest, w.Upload, offset, up)
}

// putCompressed stores a blob that comes as zstd. What it decompresses to is bounded by its size, what
// it comes as by the upload, and the decoder's memory by the largest window.
func (b *byteStream) putCompressed(ctx context.Context, d digest.Digest, up *upload) error {
	if err := up.startCompressed(d.Size()); err != nil {
		return err
	}
	if err := b.decoders.take(); err != nil {
		return err
	}
	defer b.decoders.release()
	r := compress.NewReader(up, d.Size())
	defer r.Close() //nolint:errcheck // it has no error, it gives the decoder back
	return b.blobs.Put(ctx, d, r)
}

// offset returns where an upload begins. Zero starts over whatever is kept (decision D11); an offset
// that is kept goes on there (row WR-7).
func (b *byteStream) offset(ctx context.Context, w digest.Write, up *upload) (int64, error) {
	offset := up.message.offset
	if offset == 0 {
		return 0, nil
	}
	// The blob may have been completed since the client asked.
	if err := b.present(ctx, w.Digest); err != nil {
		return 0, err
	}
	kept, err := b.committed(ctx, w)
	switch {
	case err != nil:
		return 0, err
	case offset < 0 || offset > kept:
		return 0, fmt.Errorf("%w: write_offset %d of %s, of which %d bytes are kept", errInvalid, offset, digest.Quote(up.name), kept)
	case offset < kept:
		// What the client's broken stream had brought arrived after it asked: it asks again.
		return 0, fmt.Errorf("%w: write_offset %d of %s, of which %d bytes are kept", errMoved, offset, digest.Quote(up.name), kept)
	}
	return offset, nil
}

// present returns errPresent when the blob is there.
func (b *byteStream) present(ctx context.Context, d digest.Digest) error {
	missing, err := b.blobs.Missing(ctx, []digest.Digest{d})
	if err == nil && len(missing) == 0 {
		return errPresent
	}
	return err
}

// committed returns how much of an upload is kept, so that the upload can go on there. Of a compressed
// one nothing is: its beginning could not be decompressed without the rest (rows WR-10, QWS-7).
func (b *byteStream) committed(ctx context.Context, w digest.Write) (int64, error) {
	if w.Compressor != digest.Identity || w.Digest.IsEmpty() || w.Digest.IsImpossible() {
		return 0, nil
	}
	return cas.Committed(ctx, b.blobs, w.Digest, w.Upload)
}

// QueryWriteStatus answers {size, true} for a blob that is present, else what is kept of the upload:
// {0, false} also for an upload that never was, since clients take NOT_FOUND as final (row QWS-3).
func (b *byteStream) QueryWriteStatus(ctx context.Context, req *bytestream.QueryWriteStatusRequest) (*bytestream.QueryWriteStatusResponse, error) {
	if err := checkResourceHeader(ctx, req.GetResourceName()); err != nil {
		return nil, err
	}
	w, err := digest.ParseWrite(req.GetResourceName())
	if err != nil {
		return nil, err
	}
	switch err := b.present(ctx, w.Digest); {
	case errors.Is(err, errPresent):
		return &bytestream.QueryWriteStatusResponse{CommittedSize: w.Digest.Size(), Complete: true}, nil
	case err != nil:
		return nil, err
	}
	committed, err := b.committed(ctx, w)
	if err != nil {
		return nil, err
	}
	return &bytestream.QueryWriteStatusResponse{CommittedSize: committed}, nil
}
