package objectstore

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// positionsKey is the metadata field in which a large object says where its chunks are in the
// stream: their sequences, each but the first as the distance to the one before, in base 36 and
// separated by commas. Reads find the chunk of an offset by it.
const positionsKey = "jetfarm-chunks"

// maxChunks bounds a blob to 128 GiB. The positions of that many chunks fit a message of 1 MiB even
// when a thousand other uploads interleave.
const maxChunks = 1 << 18

// maxSize is the size of the largest blob.
const maxSize = maxChunks * chunkSize

// objectInfo is the stock form of an object store's metadata.
func objectInfo(b *bucket, d digest.Digest, nuid string, f form) jetstream.ObjectInfo {
	info := jetstream.ObjectInfo{
		ObjectMeta: jetstream.ObjectMeta{Name: d.String()},
		Bucket:     b.name,
		NUID:       nuid,
		Size:       uint64(f.size),      //nolint:gosec // not negative
		Chunks:     uint32(chunksOf(d)), //nolint:gosec // at most maxChunks
		Digest:     "SHA-256=" + base64.URLEncoding.EncodeToString(f.sha256),
	}
	if f.zstd {
		info.Headers = nats.Header{encodingHeader: {encodingZstd}}
	}
	return info
}

// infoSize is about as long as the metadata of a small blob.
const infoSize = 512

// appendObjectInfo appends what json.Marshal makes of objectInfo.
func appendObjectInfo(out []byte, b *bucket, d digest.Digest, nuid string, f form) []byte {
	out = append(out, `{"name":`...)
	if instance := d.Space().Instance(); isPlain(instance) {
		out = append(out, '"')
		out = append(out, d.String()...)
		out = append(out, '"')
	} else if name, err := json.Marshal(d.String()); err == nil {
		out = append(out, name...)
	}
	if f.zstd {
		out = append(out, `,"headers":{"`+encodingHeader+`":["`+encodingZstd+`"]}`...)
	}
	out = append(out, `,"bucket":"`...)
	out = append(out, b.name...)
	out = append(out, `","nuid":"`...)
	out = append(out, nuid...)
	out = append(out, `","size":`...)
	out = strconv.AppendInt(out, f.size, 10)
	out = append(out, `,"mtime":"0001-01-01T00:00:00Z","chunks":`...)
	out = strconv.AppendInt(out, int64(chunksOf(d)), 10)
	out = append(out, `,"digest":"SHA-256=`...)
	out = base64.URLEncoding.AppendEncode(out, f.sha256)
	return append(out, `"}`...)
}

// isPlain tells a string that JSON writes as it is.
func isPlain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return false
		}
	}
	return true
}

// chunksOf is the number of chunks of a blob.
func chunksOf(d digest.Digest) int {
	return int((d.Size() + chunkSize - 1) / chunkSize)
}

// object is a large blob as it is stored.
type object struct {
	// sequence is that of the metadata in its stream.
	sequence uint64
	// chunks is the subject of the chunks.
	chunks string
	// positions are the sequences of the chunks.
	positions []uint64
	// zstd says that the chunks are frames.
	zstd bool
}

// encodeObject returns the metadata of an upload whose chunks have these positions.
func encodeObject(b *bucket, d digest.Digest, nuid string, f form, positions []uint64) ([]byte, error) {
	info := objectInfo(b, d, nuid, f)
	info.Opts = &jetstream.ObjectMetaOptions{ChunkSize: chunkSize}
	var text []byte
	last := uint64(0)
	for i, p := range positions {
		if i > 0 {
			text = append(text, ',')
		}
		text = strconv.AppendUint(text, p-last, 36)
		last = p
	}
	info.Metadata = map[string]string{positionsKey: string(text)}
	return json.Marshal(info)
}

// decodeObject reads what encodeObject wrote. Anything else, such as the mark that a stock client
// leaves when it deletes an object, is an error.
func decodeObject(b *bucket, d digest.Digest, m stored) (object, error) {
	var info jetstream.ObjectInfo
	if err := json.Unmarshal(m.data, &info); err != nil {
		return object{}, fmt.Errorf("metadata of %v: %w", d, err)
	}
	if info.Deleted {
		return object{}, fmt.Errorf("metadata of %v: the object was deleted", d)
	}
	o := object{sequence: m.sequence, chunks: b.chunks + info.NUID, zstd: isZstd(info.Headers)}
	if (!o.zstd && info.Size != uint64(d.Size())) || //nolint:gosec // not negative
		!strings.HasPrefix(info.NUID, tail(d)+".") {
		return object{}, fmt.Errorf("metadata of %v: it describes another object", d)
	}
	want := chunksOf(d)
	o.positions = make([]uint64, 0, want)
	last := uint64(0)
	for text := range strings.SplitSeq(info.Metadata[positionsKey], ",") {
		distance, err := strconv.ParseUint(text, 36, 64)
		if err != nil || distance == 0 || last+distance < last || len(o.positions) == want {
			return object{}, fmt.Errorf("metadata of %v: bad positions of its chunks", d)
		}
		last += distance
		o.positions = append(o.positions, last)
	}
	if len(o.positions) != want {
		return object{}, fmt.Errorf("metadata of %v: %d positions of chunks, want %d", d, len(o.positions), want)
	}
	return o, nil
}
