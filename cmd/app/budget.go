package app

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/nats-io/nats.go"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/objectstore"
	"github.com/jetfarm/jetfarm/cmd/run"
)

// casFlags bound what is stored. All frontends of a farm should have the same.
type casFlags struct {
	CASSize      size          `name:"cas-size" help:"Most bytes of blobs; the oldest that nobody uses give way. Default: what the broker has room for, less what else it stores." placeholder:"SIZE" env:"JETFARM_CAS_SIZE"`
	CASBlobs     int64         `name:"cas-blobs" help:"Most blobs, about. Each takes memory: about 350 bytes of the broker and 35 of each frontend and worker." default:"10000000" env:"JETFARM_CAS_BLOBS"`
	CASRetention time.Duration `name:"cas-retention" help:"How long a blob that was reported present stays at least. Uploads are refused when that leaves no room. 0 promises no time." default:"0s" env:"JETFARM_CAS_RETENTION"`
}

const (
	// minCASSize has room for some generations with a few blobs of several chunks.
	minCASSize = 64 << 20
	// minCASBlobs keeps generations from following each other too fast.
	minCASBlobs = 10_000
)

func (f *casFlags) checkCAS() error {
	var errs []error
	if f.CASSize != 0 && f.CASSize < minCASSize {
		errs = append(errs, fmt.Errorf("--cas-size %d bytes is less than %s", f.CASSize, humanize.IBytes(minCASSize)))
	}
	if f.CASBlobs < minCASBlobs {
		errs = append(errs, fmt.Errorf("--cas-blobs %d is less than %d", f.CASBlobs, minCASBlobs))
	}
	if f.CASRetention < 0 {
		errs = append(errs, fmt.Errorf("--cas-retention %v is negative", f.CASRetention))
	}
	if err := errors.Join(errs...); err != nil {
		return run.UsageError{Err: err}
	}
	return nil
}

// bound makes the blobs of a farm keep to the flags.
func (f *casFlags) bound(cfg farmConfig) farmConfig {
	cfg.blobs = objectstore.Config{Maintain: true, MaxSize: int64(f.CASSize), MaxBlobs: f.CASBlobs, Retention: f.CASRetention}
	return cfg
}

// fits reports a budget that the server of this process has no room for.
func (f *casFlags) fits(server *broker.Server) error {
	room, err := server.Room()
	if err != nil || int64(f.CASSize) <= room.Max {
		return err
	}
	return run.UsageError{Err: fmt.Errorf("--cas-size %s is more than the %s that the broker may store; --max-store sets that",
		humanize.IBytes(uint64(f.CASSize)), humanize.IBytes(uint64(room.Max)))} //nolint:gosec // not negative
}

// tellRoom tells the frontends how much a server can store until ctx ends.
func tellRoom(server *broker.Server, conn *nats.Conn) func(context.Context) error {
	return func(ctx context.Context) error {
		return objectstore.TellDisk(ctx, conn, func() (objectstore.Disk, error) {
			room, err := server.Room()
			return objectstore.Disk(room), err
		})
	}
}

// teller is tellRoom on a connection of its own. Where the server's configuration wants credentials, which
// this process has not, it tells nothing: frontends then keep to --cas-size alone.
func teller(ctx context.Context, p *process, server *broker.Server) (tell func(context.Context) error, done func()) {
	conn, err := broker.Connect(ctx, broker.ConnectConfig{Embedded: server, Name: "jetfarm broker", Once: true, Log: p.log})
	if err != nil {
		p.log.WarnContext(ctx, "frontends are not told how much room this broker has", "err", err)
		return func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		}, func() {}
	}
	return tellRoom(server, conn), conn.Close
}
