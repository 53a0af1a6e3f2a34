package app

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/dustin/go-humanize"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// probeInstance is the instance whose blobs are those of examinations.
const probeInstance = "jetfarm-doctor"

// storage opens the blobs, stores one, reads it and removes it, and asks the action cache.
func (b *patient) storage(ctx context.Context, p *process, e *exam) {
	began := time.Now()
	s, err := b.d.open(ctx, p)
	if err != nil {
		e.fail("index", "read the server's log", "the blobs can't be listed: %v", err)
		return
	}
	defer s.close()
	count := 0
	for _, n := range s.blobs.Counts() {
		count += n
	}
	e.ok("index", "%s blobs are listed in %v", humanize.Comma(int64(count)), time.Since(began).Round(time.Millisecond))
	checkRoom(ctx, e, s)
	space, err := digest.SpaceOf(probeInstance, repb.DigestFunction_SHA256, "")
	if err != nil {
		e.fail("storage", "", "%v", err)
		return
	}
	b.probe(ctx, e, s, space)
	results, err := s.js.Stream(ctx, actionStream)
	if err == nil {
		_, err = results.GetLastMsgForSubject(ctx, "$KV."+strings.TrimPrefix(actionStream, "KV_")+".none")
	}
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		e.fail("action cache", "read the server's log", "it does not answer: %v", err)
	} else {
		e.ok("action cache", "it answers")
	}
}

// checkRoom tells how much more can be stored. That the store is nearly at its limit is no finding: it
// is how it is meant to be.
func checkRoom(ctx context.Context, e *exam, s *storage) {
	switch u, err := s.blobs.Usage(ctx); {
	case err != nil:
		e.fail("room", "read the server's log", "the blobs can't be measured: %v", err)
	case u.Full != "":
		e.fail("room", "free space on the broker's disk, or give the farm more room with --cas-size and --max-store", "nothing can be stored: %s", u.Full)
	default:
		e.ok("room", "the blobs have %s %s", bytesText(uint64(u.Bytes)), limitText(u.Limit)) //nolint:gosec // not negative
	}
}

func (b *patient) probe(ctx context.Context, e *exam, s *storage, space digest.Space) {
	ctx, cancel := context.WithTimeoutCause(ctx, doctorTimeout, errors.New("no answer in time"))
	defer cancel()
	data := []byte(rand.Text())
	d := space.Of(data)
	began := time.Now()
	err := s.blobs.Put(ctx, d, bytes.NewReader(data))
	put := time.Since(began)
	if errors.Is(err, cas.ErrFull) {
		e.fail("storage", "free space on the broker's disk, or give the farm more room (docs/OPERATIONS.md)", "nothing can be stored: %v", err)
		return
	}
	if err != nil {
		e.fail("storage", "read the server's log", "a blob can't be stored: %v", err)
		return
	}
	began = time.Now()
	got, err := cas.ReadAll(ctx, s.blobs, d, int64(len(data)))
	get := time.Since(began)
	if err != nil || !bytes.Equal(got, data) {
		e.fail("storage", "read the server's log, and run 'jetfarm cas verify --all'", "a blob that was just stored can't be read: %v", err)
		return
	}
	if err := s.blobs.Remove(ctx, d); err != nil {
		e.warn("storage", "", "the blob of this examination was not removed: %v", err)
		return
	}
	e.ok("storage", "a blob was stored in %v and read in %v", put.Round(10*time.Microsecond), get.Round(10*time.Microsecond))
	const slow = 50 * time.Millisecond
	if put > slow {
		e.warn("latency", "keep the broker's data on a local SSD, and the broker near; --sync-always waits for the disk each time", "storing a small blob took %v", put.Round(time.Millisecond))
	}
}

// checkFrontend asks a frontend what it can do.
func checkFrontend(ctx context.Context, e *exam, address string) {
	const fix = "start 'jetfarm up' or 'jetfarm frontend', or correct --grpc"
	ctx, cancel := context.WithTimeoutCause(ctx, doctorTimeout, errors.New("no answer in time"))
	defer cancel()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		e.fail("frontend", fix, "%v", err)
		return
	}
	defer conn.Close() //nolint:errcheck // all was said
	c, err := repb.NewCapabilitiesClient(conn).GetCapabilities(ctx, &repb.GetCapabilitiesRequest{})
	if err != nil {
		e.fail("frontend", fix, "%s does not tell its capabilities: %v", address, err)
		return
	}
	if len(c.GetCacheCapabilities().GetDigestFunctions()) == 0 {
		e.fail("frontend", "check that this is the gRPC port of a frontend", "%s offers no digest function", address)
		return
	}
	what := "cache and execution"
	if !c.GetExecutionCapabilities().GetExecEnabled() {
		what = "cache only"
	}
	e.ok("frontend", "%s serves %s", address, what)
}

// checkReady asks a role whether it takes work.
func checkReady(ctx context.Context, e *exam, address string) {
	ctx, cancel := context.WithTimeoutCause(ctx, doctorTimeout, errors.New("no answer in time"))
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", http.NoBody)
	if err != nil {
		e.fail("readyz", "correct --http", "%v", err)
		return
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		e.fail("readyz", "start the role, or correct --http", "%v", err)
		return
	}
	defer answer.Body.Close() //nolint:errcheck // it was only read
	const most = 1 << 10
	text, err := io.ReadAll(io.LimitReader(answer.Body, most))
	if err != nil || answer.StatusCode != http.StatusOK {
		e.fail("readyz", "read the role's log", "%s says %s: %s", address, answer.Status, strings.TrimSpace(string(text)))
		return
	}
	e.ok("readyz", "%s takes work", address)
}

// workers tells who executes actions.
func (b *patient) workers(ctx context.Context, e *exam) {
	ctx, cancel := context.WithTimeoutCause(ctx, doctorTimeout, errors.New("no answer in time"))
	defer cancel()
	kv, err := b.js.KeyValue(ctx, "workers")
	var keys []string
	if err == nil {
		keys, err = kv.Keys(ctx)
	}
	if errors.Is(err, jetstream.ErrNoKeysFound) || (err == nil && len(keys) == 0) {
		e.warn("workers", "start 'jetfarm worker' on the machines that shall execute actions; a farm that is a cache only needs none", "none has registered: actions wait")
		return
	}
	if err != nil {
		e.warn("workers", "", "they can't be listed: %v", err)
		return
	}
	e.ok("workers", "%d have registered", len(keys))
}
