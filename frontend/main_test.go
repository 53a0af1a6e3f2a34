package frontend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/frontend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var space = must(digest.SpaceOf("", repb.DigestFunction_SHA256, ""))

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// harness is a frontend on a real broker and store, and clients of it over loopback.
type harness struct {
	farm    *brokertest.Farm
	broker  *broker.Client
	blobs   cas.Store
	actions *actioncache.Cache
	server  *frontend.Server
	address string
	conn    *grpc.ClientConn
	clients
	metrics *prometheus.Registry
	js      jetstream.JetStream
}

// clients are the stubs of all services.
type clients struct {
	caps  repb.CapabilitiesClient
	cas   repb.ContentAddressableStorageClient
	bytes bytestream.ByteStreamClient
	ac    repb.ActionCacheClient
	exec  repb.ExecutionClient
	ops   longrunningpb.OperationsClient
}

func clientsOf(conn *grpc.ClientConn) clients {
	return clients{
		caps: repb.NewCapabilitiesClient(conn), cas: repb.NewContentAddressableStorageClient(conn),
		bytes: bytestream.NewByteStreamClient(conn), ac: repb.NewActionCacheClient(conn),
		exec: repb.NewExecutionClient(conn), ops: longrunningpb.NewOperationsClient(conn),
	}
}

// start makes a frontend; each change is applied to its configuration.
func start(t testing.TB, changes ...func(*frontend.Config)) *harness {
	t.Helper()
	return startOn(t, brokertest.Start(t), changes...)
}

// startOn makes another frontend on a farm.
func startOn(t testing.TB, farm *brokertest.Farm, changes ...func(*frontend.Config)) *harness {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelError}))
	small := farm.Connect(t)
	store, err := objectstore.Open(t.Context(), objectstore.Config{Small: small, Bulk: farm.Connect(t), Log: log})
	if err != nil {
		t.Fatalf("objectstore.Open: %v", err)
	}
	actions, err := actioncache.Open(t.Context(), actioncache.Config{Conn: small, Blobs: store, Log: log, MemoryBytes: 16 << 20})
	if err != nil {
		t.Fatalf("actioncache.Open: %v", err)
	}
	running(t, actions.Run)
	h := &harness{farm: farm, broker: farm.Client(t), blobs: store, actions: actions, metrics: prometheus.NewRegistry(), js: must(jetstream.New(farm.Connect(t)))}
	cfg := frontend.Config{
		Blobs: store, Actions: actions, Broker: h.broker, Log: log, ExecEnabled: true,
		Registerer: h.metrics,
	}
	for _, change := range changes {
		change(&cfg)
	}
	if err := cfg.Limits.Validate(); err != nil {
		t.Fatalf("Validate: %v", err)
	}
	h.blobs = cfg.Blobs
	h.server = frontend.New(cfg)
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("Listen: %v", err)
	}
	h.address = listener.Addr().String()
	served := make(chan error, 1)
	go func() { served <- h.server.GRPC().Serve(listener) }()
	t.Cleanup(func() {
		// The test's context has ended, so nothing may linger.
		if err := h.server.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	h.conn = h.dial(t)
	h.clients = clientsOf(h.conn)
	return h
}

// dial opens another connection with a client's default limits.
func (h *harness) dial(t testing.TB, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := grpc.NewClient(h.address, options...)
	if err != nil {
		t.Fatalf("NewClient: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// put stores a blob and returns its digest.
func (h *harness) put(t testing.TB, data []byte) digest.Digest {
	t.Helper()
	d, err := cas.PutBytes(t.Context(), h.blobs, space, data)
	if err != nil {
		t.Fatalf("PutBytes: %v", err)
	}
	return d
}

// putMessage stores a message and returns its digest.
func (h *harness) putMessage(t testing.TB, m proto.Message) digest.Digest {
	t.Helper()
	return h.put(t, encode(m))
}

func encode(m proto.Message) []byte {
	return must(proto.MarshalOptions{Deterministic: true}.Marshal(m))
}

// missing tells whether a blob is absent, by asking the frontend.
func (h *harness) missing(t testing.TB, d digest.Digest) bool {
	t.Helper()
	resp, err := h.cas.FindMissingBlobs(t.Context(), &repb.FindMissingBlobsRequest{
		InstanceName: d.Space().Instance(), BlobDigests: []*repb.Digest{d.Proto()},
	})
	if err != nil {
		t.Fatalf("FindMissingBlobs(%v): %v", d, err)
	}
	return len(resp.GetMissingBlobDigests()) == 1
}

// random returns n bytes that do not repeat between tests.
func random(n int) []byte {
	b := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		v := rand.Uint64()
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	for i := n &^ 7; i < n; i++ {
		b[i] = byte(rand.Uint32())
	}
	return b
}

// absent is the digest of a blob that nobody has.
func absent() digest.Digest { return space.Of(random(16)) }

// read downloads a resource.
func (h *harness) read(ctx context.Context, req *bytestream.ReadRequest) ([]byte, error) {
	stream, err := h.bytes.Read(ctx, req)
	if err != nil {
		return nil, err
	}
	var data []byte
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return data, nil
		}
		if err != nil {
			return data, err
		}
		data = append(data, m.GetData()...)
	}
}

// uploadName is a fresh upload of a blob.
func uploadName(d digest.Digest) string {
	prefix := ""
	if d.Space().Instance() != "" {
		prefix = d.Space().Instance() + "/"
	}
	return prefix + "uploads/" + uuid.NewString() + "/" + d.Blob()
}

// write sends messages, half-closes and returns the answer.
func (h *harness) write(ctx context.Context, messages ...*bytestream.WriteRequest) (*bytestream.WriteResponse, error) {
	stream, err := h.bytes.Write(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		if err := stream.Send(m); err != nil {
			break // CloseAndRecv has the reason.
		}
	}
	return stream.CloseAndRecv()
}

// chunks cuts an upload into messages.
func chunks(name string, data []byte, size int) []*bytestream.WriteRequest {
	var messages []*bytestream.WriteRequest
	for offset := 0; ; {
		n := min(size, len(data)-offset)
		m := &bytestream.WriteRequest{WriteOffset: int64(offset), Data: data[offset : offset+n], FinishWrite: offset+n == len(data)}
		if offset == 0 {
			m.ResourceName = name
		}
		messages = append(messages, m)
		offset += n
		if offset == len(data) {
			return messages
		}
	}
}

// wantCode fails the test unless err has the code and, when text is given, names it.
func wantCode(t testing.TB, what string, err error, code codes.Code, text ...string) {
	t.Helper()
	if got := status.Code(err); got != code {
		t.Fatalf("%s: %v, want the code %v", what, err, code)
	}
	for _, s := range text {
		if !strings.Contains(status.Convert(err).Message(), s) {
			t.Fatalf("%s: %v, want the text %q", what, err, s)
		}
	}
}

// eventually polls cond until it holds or half a minute has passed.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline.C:
			t.Fatalf("not within 30 s: %s", what)
		case <-tick.C:
		}
	}
}

// handlers returns how many goroutines are in code of this package, which are calls being served.
func handlers() int { return goroutines("jetfarm/frontend.(*") }

// goroutines returns how many goroutines have a text in their stacks.
func goroutines(text string) int {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	count := 0
	for g := range bytes.SplitSeq(buf, []byte("\n\n")) {
		if bytes.Contains(g, []byte(text)) {
			count++
		}
	}
	return count
}

// soon is much longer than what happens at once takes on a machine that has other things to do, and much
// shorter than the bounds that end what nobody ends.
const soon = 10 * time.Second

// within fails the test when f does not end soon.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	begin := time.Now()
	f()
	if took := time.Since(begin); took > soon {
		t.Fatalf("%s took %v, want at most %v", what, took, soon)
	}
}

// name makes a subtest's name of any value.
func name(v any) string { return strings.ReplaceAll(fmt.Sprint(v), "/", ":") }

// running runs a service until the test's end.
func running(t testing.TB, service func(context.Context) error) {
	t.Helper()
	var group errgroup.Group
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	group.Go(func() error { return service(ctx) })
	t.Cleanup(func() {
		cancel(nil)
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	})
}
