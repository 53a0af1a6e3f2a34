package upstream

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// Client is another cache. It is a cas.Store whose errors are those of package cas: what does not
// answer, answers with an error of its own or is known to be down is cas.ErrUnavailable.
type Client struct {
	cfg     Config
	health  health
	metrics *metrics

	// Whole blobs travel on a connection of their own, so that they do not delay the small calls.
	small, bulk  *grpc.ClientConn
	capabilities repb.CapabilitiesClient
	blobs        repb.ContentAddressableStorageClient
	results      repb.ActionCacheClient
	bytes        bytestream.ByteStreamClient

	// What the upstream has forbidden is not tried again.
	noBlobs, noResults atomic.Bool
}

var _ cas.Store = (*Client)(nil)

// maxMessage bounds a message of the upstream.
const maxMessage = 16 << 20

// Open makes the connections and asks for the capabilities. An upstream that does not answer is no
// error: Run goes on asking.
func Open(ctx context.Context, cfg Config) (*Client, error) {
	cfg = cfg.withDefaults()
	transport, err := cfg.transport()
	if err != nil {
		return nil, fmt.Errorf("upstream cache: %w", err)
	}
	c := &Client{cfg: cfg, health: health{wake: make(chan struct{}, 1)}}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: cfg.Probe / 2, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 10 * time.Second},
			MinConnectTimeout: min(cfg.Stall, probeBound),
		}),
		// Pings only while calls are open: servers cut off those who ping oftener than they like.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithInitialWindowSize(1 << 20), grpc.WithInitialConnWindowSize(4 << 20),
		grpc.WithReadBufferSize(128 << 10), grpc.WithWriteBufferSize(128 << 10),
		grpc.WithUserAgent("jetfarm"),
		grpc.WithDisableServiceConfig(),
	}
	if c.small, err = grpc.NewClient("dns:///"+cfg.Endpoint.Address, options...); err == nil {
		c.bulk, err = grpc.NewClient("dns:///"+cfg.Endpoint.Address, options...)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("upstream cache: %w", err), c.Close())
	}
	c.capabilities, c.blobs = repb.NewCapabilitiesClient(c.small), repb.NewContentAddressableStorageClient(c.small)
	c.results, c.bytes = repb.NewActionCacheClient(c.small), bytestream.NewByteStreamClient(c.bulk)
	c.metrics = newMetrics(cfg.Registerer, func() bool {
		_, err := c.health.able()
		return err == nil
	})
	if err := c.learn(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, errors.Join(context.Cause(ctx), c.Close())
		}
		c.cfg.Log.WarnContext(ctx, "upstream cache does not answer; the farm goes on without it until it does",
			"address", cfg.Endpoint.Address, "err", err)
	}
	return c, nil
}

// Close ends the connections.
func (c *Client) Close() error {
	var errs []error
	for _, conn := range []*grpc.ClientConn{c.small, c.bulk} {
		if conn != nil {
			errs = append(errs, conn.Close())
		}
	}
	return errors.Join(errs...)
}

// outgoing is ctx with the headers of every call.
func (c *Client) outgoing(ctx context.Context) context.Context {
	if len(c.cfg.Header) == 0 {
		return ctx
	}
	return metadata.NewOutgoingContext(ctx, c.cfg.Header)
}

// count counts a call that has ended with what gRPC returned.
func (c *Client) count(method string, err error) {
	if c.metrics != nil {
		c.metrics.requests.WithLabelValues(method, status.Code(err).String()).Inc()
	}
}

// call makes a unary call within the bound on stalls and returns its error as one of package cas.
func (c *Client) call(ctx context.Context, method string, f func(ctx context.Context) error) error {
	begun := time.Now()
	bound, cancel := context.WithTimeoutCause(c.outgoing(ctx), c.cfg.Stall, errStalled)
	defer cancel()
	err := f(bound)
	c.count(method, err)
	return c.done(ctx, begun, failure(ctx, bound, err))
}

// can returns what the upstream can do when it can have d.
func (c *Client) can(d digest.Digest) (*abilities, error) {
	can, err := c.health.able()
	if err != nil {
		return nil, err
	}
	if f := d.Space().Function(); !can.functions[f] {
		return nil, fmt.Errorf("%w %v", errFunction, f)
	}
	return can, nil
}

// there is the name of d at the upstream.
func (c *Client) there(d digest.Digest) (digest.Digest, error) {
	space, err := c.spaceThere(d.Space())
	if err != nil {
		return digest.Digest{}, err
	}
	return space.New(d.Hash(), d.Size())
}

// spaceThere is the key space of the upstream that has the blobs of a space of the farm.
func (c *Client) spaceThere(space digest.Space) (digest.Space, error) {
	instance := c.cfg.Endpoint.Instance
	if own := space.Instance(); instance == "" || own == "" {
		instance += own
	} else {
		instance += "/" + own
	}
	there, err := digest.SpaceOf(instance, space.Function().Proto(), "")
	if err != nil {
		return digest.Space{}, fmt.Errorf("%w: instance name: %w", ErrRefused, err)
	}
	return there, nil
}
