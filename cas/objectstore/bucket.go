package objectstore

import (
	"context"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/semaphore"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// chunkSize is the payload of every chunk but the last of a blob, and the size of the largest blob
// that is a single message. It leaves room for headers under the broker's default payload of 1 MiB.
const chunkSize = 512 << 10

// family is a kind of bucket and the letter for it in bucket names.
type family string

const (
	small family = "s"
	large family = "l"
)

// familyOf tells which buckets hold the blob.
func familyOf(d digest.Digest) family {
	if d.Size() <= chunkSize {
		return small
	}
	return large
}

// bucket is one object store: a stream of chunks and metadata.
type bucket struct {
	name   string
	stream string
	chunks string // the subject prefix of chunks, with the last dot
	metas  string // the subject prefix of metadata, with the last dot

	family     family
	generation uint32
	shard      int

	// flow bounds the bytes published to the stream and not yet acknowledged. An upload goes through
	// budget, which is the flow and, in the copy of the bucket that place returns, counts them.
	flow   *semaphore.Weighted
	budget budget
}

func newBucket(f family, generation uint32, shard int, inFlight int64) *bucket {
	flow := semaphore.NewWeighted(inFlight)
	name := fmt.Sprintf("cas-%s-%d-%d", f, generation, shard)
	return &bucket{
		name:       name,
		stream:     streamPrefix + name,
		chunks:     "$O." + name + ".C.",
		metas:      "$O." + name + ".M.",
		family:     f,
		generation: generation,
		shard:      shard,
		flow:       flow,
		budget:     flow,
	}
}

const streamPrefix = "OBJ_"

// parseStream is the inverse of the stream name in newBucket. Streams of other parts are not ok.
func parseStream(stream string) (f family, generation uint32, shard int, ok bool) {
	name, ok := strings.CutPrefix(stream, streamPrefix+"cas-")
	parts := strings.Split(name, "-")
	if !ok || len(parts) != 3 || (family(parts[0]) != small && family(parts[0]) != large) {
		return "", 0, 0, false
	}
	g, errG := strconv.ParseUint(parts[1], 10, 32)
	n, errN := strconv.ParseUint(parts[2], 10, 8)
	if errG != nil || errN != nil || g == 0 || g > maxGeneration ||
		strconv.FormatUint(g, 10) != parts[1] || strconv.FormatUint(n, 10) != parts[2] {
		return "", 0, 0, false
	}
	return family(parts[0]), uint32(g), int(n), true
}

// create makes the stream or brings it to this configuration.
func (b *bucket) create(ctx context.Context, js jetstream.JetStream, replicas int, maxBytes int64) error {
	if maxBytes == 0 {
		maxBytes = -1
	}
	config := jetstream.StreamConfig{
		Name:        b.stream,
		Description: "blobs of the content addressable storage",
		Subjects:    []string{b.chunks + ">", b.metas + ">"},
		Storage:     jetstream.FileStorage,
		Discard:     jetstream.DiscardNew,
		MaxBytes:    maxBytes,
		Replicas:    replicas,
		AllowDirect: true,
		AllowRollup: true,
		Compression: jetstream.NoCompression,
		Duplicates:  100 * time.Millisecond,
	}
	if b.family == small {
		// A bound far beyond any use: the broker then stores in blocks of 4 MiB instead of 8, which
		// halves what a read of a cold blob loads.
		config.MaxMsgsPerSubject = 1e9
	}
	_, err := js.CreateOrUpdateStream(ctx, config)
	return err
}

// tail is what follows the chunk prefix in the subject of a small blob, and the object's nuid:
// `<hh>.<space>.<hash>-<size>` where hh are the first two digits of the hash. Metadata of large
// blobs names tails with one more token, the upload.
func tail(d digest.Digest) string {
	return d.Hash()[:2] + "." + d.Space().Token() + "." + d.Hash() + "-" + strconv.FormatInt(d.Size(), 10)
}

// meta is the subject of the blob's metadata.
func (b *bucket) meta(d digest.Digest) string {
	return b.metas + base64.URLEncoding.EncodeToString([]byte(d.String()))
}

// parseChunk is the inverse of tail.
func parseChunk(tail string) (digest.Digest, bool) {
	prefix, rest, ok := strings.Cut(tail, ".")
	token, name, named := strings.Cut(rest, ".")
	hash, size, sized := strings.Cut(name, "-")
	n, err := strconv.ParseInt(size, 10, 64)
	if !ok || !named || !sized || err != nil || strconv.FormatInt(n, 10) != size || !strings.HasPrefix(hash, prefix) || len(prefix) != 2 {
		return digest.Digest{}, false
	}
	space, err := digest.ParseToken(token)
	if err != nil {
		return digest.Digest{}, false
	}
	d, err := space.New(hash, n)
	return d, err == nil
}

// parseMeta is the inverse of bucket.meta without its prefix.
func parseMeta(name string) (digest.Digest, bool) {
	raw, err := base64.URLEncoding.Strict().DecodeString(name)
	if err != nil {
		return digest.Digest{}, false
	}
	read, err := digest.ParseRead(string(raw))
	return read.Digest, err == nil && read.Digest.String() == string(raw)
}
