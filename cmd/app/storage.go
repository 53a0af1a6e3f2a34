package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// operatorFlags are those of a command that looks into a farm from outside.
type operatorFlags struct {
	NATS []string `name:"nats" help:"URLs of the NATS servers. Default: the farm that runs on this machine with the data directory, or else ${default_nats}." env:"JETFARM_NATS" placeholder:"URL,..."`
	Data string   `help:"Data directory of 'jetfarm up' or 'jetfarm broker' on this machine. Default: the user's state directory." type:"path" placeholder:"DIR"`
}

const (
	defaultNATS = "nats://127.0.0.1:4222"
	// addressFile is where a process with a NATS server says below its data directory how to reach it.
	addressFile = "address"
	// operatorTimeout bounds how long an operator waits for the farm to answer at all.
	operatorTimeout = 5 * time.Second
)

// tellAddress lets operators on this machine find the farm by its data directory. The fields are
// those of the ready line.
func tellAddress(data string, fields ...string) (forget func(), err error) {
	path := filepath.Join(data, addressFile)
	var text strings.Builder
	for pair := range slices.Chunk(fields, 2) {
		if pair[1] != "" {
			fmt.Fprintf(&text, "%s=%s\n", pair[0], pair[1])
		}
	}
	if err := os.WriteFile(path, []byte(text.String()), 0o644); err != nil { //nolint:gosec // it is no secret
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return func() { os.Remove(path) }, nil //nolint:errcheck // a stale address is recognised by its silence
}

// local returns what a farm on this machine says of itself, and the file where it does.
func (f *operatorFlags) local() (fields map[string]string, path string) {
	data, err := dataDir(f.Data)
	if err != nil {
		return nil, ""
	}
	path = filepath.Join(data, addressFile)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, path
	}
	fields = make(map[string]string)
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			fields[key] = value
		}
	}
	return fields, path
}

// servers returns the URLs and how they were found, for errors.
func (f *operatorFlags) servers() (urls []string, found string) {
	if len(f.NATS) > 0 {
		return f.NATS, "address from --nats"
	}
	if fields, path := f.local(); fields["nats"] != "" {
		return []string{fields["nats"]}, "address from " + path
	}
	return []string{defaultNATS}, "the default address; --nats names another"
}

// storage is the blobs of a farm, for an operator.
type storage struct {
	connections []*nats.Conn
	js          jetstream.JetStream
	blobs       *objectstore.Store
}

// connect opens connections to the farm's broker without waiting for it to come up.
func (f *operatorFlags) connect(ctx context.Context, p *process, names ...string) ([]*nats.Conn, error) {
	urls, found := f.servers()
	ctx, cancel := context.WithTimeoutCause(ctx, operatorTimeout, errors.New("no answer in time"))
	defer cancel()
	var connections []*nats.Conn
	for _, name := range names {
		nc, err := broker.Connect(ctx, broker.ConnectConfig{Servers: urls, Name: "jetfarm " + name, Once: true, Log: p.log})
		if err != nil {
			closeAll(connections)
			return nil, fmt.Errorf("%w (%s)", err, found)
		}
		connections = append(connections, nc)
	}
	return connections, nil
}

func closeAll(connections []*nats.Conn) {
	for _, nc := range connections {
		nc.Close()
	}
}

// errNoFarm reports a broker that no farm has used.
var errNoFarm = errors.New("there are no blobs of a jetfarm farm on this NATS server; start 'jetfarm up' or a frontend first, or name another server with --nats")

// open opens the blobs of a farm that exists.
func (f *operatorFlags) open(ctx context.Context, p *process) (*storage, error) {
	connections, err := f.connect(ctx, p, "operator", "operator bulk")
	if err != nil {
		return nil, err
	}
	s := &storage{connections: connections}
	if err := s.open(ctx, p); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *storage) open(ctx context.Context, p *process) (err error) {
	if s.js, err = jetstream.New(s.connections[0], jetstream.WithDefaultTimeout(operatorTimeout)); err != nil {
		return err
	}
	// Opening a store makes its streams: of a farm that does not exist this would make half of one, and
	// with other replicas it would change what is there.
	replicas := 0
	streams := s.js.ListStreams(ctx)
	for info := range streams.Info() {
		if strings.HasPrefix(info.Config.Name, blobStreams) {
			replicas = max(replicas, info.Config.Replicas)
		}
	}
	switch err := streams.Err(); {
	case errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrJetStreamNotEnabled):
		return errors.New("this NATS server has no JetStream; start it with 'jetfarm broker', or turn JetStream on in its configuration")
	case err != nil:
		return fmt.Errorf("list the streams: %w", err)
	case replicas == 0:
		return errNoFarm
	}
	s.blobs, err = objectstore.Open(ctx, objectstore.Config{
		Small: s.connections[0], Bulk: s.connections[1], Replicas: replicas, Log: p.log,
	})
	return err
}

// blobStreams and actionStream name the streams of a farm's storage.
const (
	blobStreams  = "OBJ_cas-"
	actionStream = "KV_ac-1"
)

func (s *storage) close() { closeAll(s.connections) }

// with opens the blobs for the time of a function. Other processes hear of what it stores and of what
// it finds damaged.
func (f *operatorFlags) with(ctx context.Context, p *process, do func(ctx context.Context, s *storage) error) error {
	s, err := f.open(ctx, p)
	if err != nil {
		return err
	}
	defer s.close()
	return run.Beside(ctx, func(ctx context.Context) error { return do(ctx, s) }, s.blobs.Run)
}

// spaceFlags choose a key space.
type spaceFlags struct {
	Instance       string `help:"Instance name of the blobs." default:""`
	DigestFunction string `help:"Digest function of the blobs, such as sha256 or blake3." default:"sha256" placeholder:"NAME"`
}

func (f *spaceFlags) space() (digest.Space, error) {
	var names []string
	for _, fn := range digest.Functions() {
		if strings.EqualFold(fn.String(), f.DigestFunction) {
			s, err := digest.SpaceOf(f.Instance, fn.Proto(), "")
			if err != nil {
				return s, run.UsageError{Err: fmt.Errorf("--instance: %w", err)}
			}
			return s, nil
		}
		names = append(names, fn.String())
	}
	return digest.Space{}, run.UsageError{Err: fmt.Errorf("--digest-function %s is none of %s", digest.Quote(f.DigestFunction), strings.Join(names, ", "))}
}

// parse reads a digest as people have it: HASH/SIZE, HASH:SIZE, HASH-SIZE, the hash alone, or a
// resource name as in logs, which has its own key space.
func (f *spaceFlags) parse(text string) (digest.Digest, error) {
	space, err := f.space()
	if err != nil {
		return digest.Digest{}, err
	}
	if strings.Contains(text, "blobs/") {
		name, err := digest.ParseRead(strings.TrimPrefix(text, "/"))
		if err != nil {
			return digest.Digest{}, run.UsageError{Err: err}
		}
		return name.Digest, nil
	}
	hash, size := text, ""
	if i := strings.IndexAny(text, "/:-"); i >= 0 {
		hash, size = text[:i], text[i+1:]
	}
	n := int64(-1)
	if size != "" || hash != text {
		if n, err = strconv.ParseInt(size, 10, 64); err != nil || n < 0 {
			return digest.Digest{}, run.UsageError{Err: fmt.Errorf("digest %s: the size is not a number (write HASH/SIZE)", digest.Quote(text))}
		}
	}
	d, err := space.New(strings.ToLower(hash), max(n, 0))
	if err != nil {
		return digest.Digest{}, run.UsageError{Err: fmt.Errorf("%w (write HASH/SIZE, HASH or a resource name)", err)}
	}
	if n < 0 {
		return d, errNoSize
	}
	return d, nil
}

// errNoSize comes with a digest whose size is yet to be found.
var errNoSize = errors.New("no size")

// find is parse, and finds the size of a hash that was given alone.
func (f *spaceFlags) find(ctx context.Context, s cas.Store, text string) (digest.Digest, error) {
	d, err := f.parse(text)
	if errors.Is(err, errNoSize) {
		return cas.Find(ctx, s, d.Space(), d.Hash())
	}
	return d, err
}

// check reports the digests among texts that can't be one, before the farm is bothered.
func (f *spaceFlags) check(texts ...string) error {
	if _, err := f.space(); err != nil {
		return err
	}
	var errs []error
	for _, text := range texts {
		if _, err := f.parse(text); err != nil && !errors.Is(err, errNoSize) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// printable renders what a client has named for a terminal: quoted when it could do more than be read.
func printable(name string) string {
	if quoted := strconv.Quote(name); quoted != `"`+name+`"` {
		return quoted
	}
	return name
}

// readMessageBytes reads a blob that is to be decoded.
func readMessageBytes(ctx context.Context, s cas.Store, d digest.Digest) ([]byte, error) {
	const most = 64 << 20
	if d.Size() > most {
		return nil, fmt.Errorf("%v has %d bytes, at most %d are decoded; 'jetfarm cas get' reads it", d, d.Size(), most)
	}
	return cas.ReadAll(ctx, s, d, most)
}

// proto of a digest, or what is wrong with it.
func parseIn(space digest.Space, m *repb.Digest) string {
	d, err := space.Parse(m)
	if err != nil {
		return "invalid digest"
	}
	return d.Hash() + "/" + strconv.FormatInt(d.Size(), 10)
}

// counting counts what is written through it.
type counting struct {
	w io.Writer
	n int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
