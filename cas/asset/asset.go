package asset

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// ErrNotFound reports a name that stands for nothing, or for nothing any more. Other errors are
// cas.ErrUnavailable, cas.ErrFull or the cause of ctx.
var ErrNotFound = errors.New("asset is not known")

const (
	bucket        = "asset-1"
	subjectPrefix = "$KV." + bucket + "."
	// requestTimeout bounds each request to the broker.
	requestTimeout = 5 * time.Second
	// minBytes is the smallest bucket that is made where the broker has no room to set MaxBytes aside.
	minBytes = 4 << 20
	// maxEntry bounds an entry; it is below the message limit of every broker.
	maxEntry = 256 << 10
)

// Kind tells what an asset is fetched as.
type Kind string

// The kinds of assets.
const (
	Blob      Kind = "blob"
	Directory Kind = "directory"
)

// Qualifier is one of the name and value pairs that select content below a URI.
type Qualifier struct{ Name, Value string }

// Name is the name of an asset.
type Name struct {
	Space      digest.Space
	Kind       Kind
	URI        string
	Qualifiers []Qualifier // in any order
}

// subject is where the name's entry is. URI and qualifiers may hold secrets, so that only a hash of
// them is stored.
func (n Name) subject() string {
	sorted := slices.SortedFunc(slices.Values(n.Qualifiers), func(a, b Qualifier) int {
		return strings.Compare(a.Name+"\x00"+a.Value, b.Name+"\x00"+b.Value)
	})
	h := sha256.New()
	add := func(s string) {
		h.Write(binary.AppendUvarint(nil, uint64(len(s))))
		h.Write([]byte(s))
	}
	add(n.URI)
	for _, q := range sorted {
		add(q.Name)
		add(q.Value)
	}
	return subjectPrefix + n.Space.Token() + "." + string(n.Kind) + "." + hex.EncodeToString(h.Sum(nil))
}

// Entry is what a name stands for.
type Entry struct {
	Digest digest.Digest
	// Stored is when the content was pushed, or when its retrieval began.
	Stored time.Time
	// Expires is from when on the entry is no longer found; zero is never.
	Expires time.Time
	// Blobs and Directories are what the content refers to and must be there with it.
	Blobs, Directories []digest.Digest
}

// stored is an Entry as it is kept, in JSON.
type stored struct {
	Blob        string     `json:"blob"` // {hash}/{size}
	Stored      time.Time  `json:"stored"`
	Expires     *time.Time `json:"expires,omitempty"`
	Blobs       []string   `json:"blobs,omitempty"`
	Directories []string   `json:"directories,omitempty"`
}

// Config is what Open needs.
type Config struct {
	Conn *nats.Conn
	// Replicas is in how many brokers an entry is kept, 1 by default.
	Replicas int
	// MaxBytes bounds the bucket, 64 MiB by default, less where the broker has not that much.
	MaxBytes int64
	Log      *slog.Logger
}

// Names is the index of names. Its methods may be called concurrently.
type Names struct {
	js     jetstream.JetStream
	stream jetstream.Stream
}

// Open makes the bucket if there is none and brings its limits up to date.
func Open(ctx context.Context, cfg Config) (*Names, error) {
	size := cfg.MaxBytes
	if size == 0 {
		size = 64 << 20
	}
	js, err := jetstream.New(cfg.Conn)
	if err != nil {
		return nil, fmt.Errorf("asset names: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*requestTimeout, errNoAnswer)
	defer cancel()
	for {
		stream, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
			Name: "KV_" + bucket, Description: "jetfarm asset names", Subjects: []string{subjectPrefix + ">"},
			MaxMsgsPerSubject: 1, MaxBytes: size, MaxMsgSize: maxEntry + 4<<10, Discard: jetstream.DiscardOld, Storage: jetstream.FileStorage,
			Replicas: max(cfg.Replicas, 1), Duplicates: 100 * time.Millisecond, AllowRollup: true, AllowDirect: true,
		})
		if err == nil {
			return &Names{js: js, stream: stream}, nil
		}
		if err = failure(ctx, err); !errors.Is(err, cas.ErrFull) || size/4 < minBytes {
			return nil, fmt.Errorf("asset names: bucket %s: %w", bucket, err)
		}
		size /= 4
		cfg.Log.WarnContext(ctx, "the broker has little room for the names of assets", "bytes", size, "err", err)
	}
}

// Get returns what a name stands for now.
func (n *Names) Get(ctx context.Context, name Name) (Entry, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	m, err := n.stream.GetLastMsgForSubject(ctx, name.subject())
	if errors.Is(err, jetstream.ErrMsgNotFound) || (err == nil && m.Header.Get("KV-Operation") != "") {
		return Entry{}, ErrNotFound
	}
	if err != nil {
		return Entry{}, fmt.Errorf("read the name of an asset: %w", failure(ctx, err))
	}
	e, err := decode(name.Space, m.Data)
	if err != nil {
		return Entry{}, fmt.Errorf("%w: its entry is damaged: %v", ErrNotFound, err) //nolint:errorlint // what cannot be read is not there
	}
	if !e.Expires.IsZero() && !time.Now().Before(e.Expires) {
		return Entry{}, fmt.Errorf("%w: it expired at %v", ErrNotFound, e.Expires)
	}
	return e, nil
}

// Put makes a name stand for an entry, in place of an earlier one. The digests of the entry are of the
// name's space.
func (n *Names) Put(ctx context.Context, name Name, e Entry) error {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	data, err := encode(e)
	if err != nil {
		return err
	}
	if _, err := n.js.Publish(ctx, name.subject(), data); err != nil {
		return fmt.Errorf("store the name of an asset: %w", failure(ctx, err))
	}
	return nil
}

func encode(e Entry) ([]byte, error) {
	s := stored{Blob: text(e.Digest), Stored: e.Stored.UTC(), Blobs: texts(e.Blobs), Directories: texts(e.Directories)}
	if !e.Expires.IsZero() {
		expires := e.Expires.UTC()
		s.Expires = &expires
	}
	data, err := json.Marshal(s)
	if err == nil && len(data) > maxEntry {
		err = fmt.Errorf("%w: its entry has %d bytes, at most %d are kept", cas.ErrFull, len(data), maxEntry)
	}
	return data, err
}

func decode(space digest.Space, data []byte) (Entry, error) {
	var s stored
	if err := json.Unmarshal(data, &s); err != nil {
		return Entry{}, err
	}
	e := Entry{Stored: s.Stored}
	if s.Expires != nil {
		e.Expires = *s.Expires
	}
	var err error
	if e.Digest, err = parse(space, s.Blob); err != nil {
		return Entry{}, err
	}
	for _, list := range []struct {
		from []string
		to   *[]digest.Digest
	}{{s.Blobs, &e.Blobs}, {s.Directories, &e.Directories}} {
		for _, text := range list.from {
			d, err := parse(space, text)
			if err != nil {
				return Entry{}, err
			}
			*list.to = append(*list.to, d)
		}
	}
	return e, nil
}

func text(d digest.Digest) string { return fmt.Sprintf("%s/%d", d.Hash(), d.Size()) }

func texts(ds []digest.Digest) []string {
	var out []string
	for _, d := range ds {
		out = append(out, text(d))
	}
	return out
}

func parse(space digest.Space, text string) (digest.Digest, error) {
	hash, rest, _ := strings.Cut(text, "/")
	var size int64
	if _, err := fmt.Sscanf(rest, "%d", &size); err != nil {
		return digest.Digest{}, fmt.Errorf("%q is not HASH/SIZE", text)
	}
	return space.New(hash, size)
}

var errNoAnswer = fmt.Errorf("%w: no answer from the broker within %v", cas.ErrUnavailable, requestTimeout)

// failure is the error of a request: the cause of ctx if that is why, else one of package cas.
func failure(ctx context.Context, err error) error {
	var api *jetstream.APIError
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &api) && (api.ErrorCode == 10023 || api.ErrorCode == 10047 || api.ErrorCode == 10077):
		// The broker's insufficient resources, storage exceeded and maximum bytes exceeded.
		return fmt.Errorf("%w: %w", cas.ErrFull, err)
	default:
		return fmt.Errorf("%w: %w", cas.ErrUnavailable, err)
	}
}
