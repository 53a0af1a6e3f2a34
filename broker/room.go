package broker

import (
	"fmt"

	"github.com/nats-io/nats-server/v2/server"
	"golang.org/x/sys/unix"
)

// Room is how much a server can store.
type Room struct {
	Server string
	// Free and Total are the bytes of the file system of the streams.
	Free, Total int64
	// Max is the most bytes of all streams on disk, and Used what they have.
	Max, Used int64
}

// Room measures how much the server can store. It asks no other server.
func (s *Server) Room() (Room, error) {
	config := s.nats.JetStreamConfig()
	if config == nil {
		return Room{}, fmt.Errorf("%w: JetStream is off", ErrUnavailable)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(config.StoreDir, &fs); err != nil {
		return Room{}, fmt.Errorf("free space of %s: %w", config.StoreDir, err)
	}
	stats, err := s.nats.Jsz(&server.JSzOptions{})
	if err != nil {
		return Room{}, fmt.Errorf("nats server: %w", err)
	}
	block := int64(fs.Bsize) //nolint:unconvert // has another type on some systems
	return Room{
		Server: s.nats.Name(),
		Free:   int64(fs.Bavail) * block, //nolint:gosec // no disk is that large
		Total:  int64(fs.Blocks) * block, //nolint:gosec // no disk is that large
		Max:    config.MaxStore,
		Used:   int64(stats.Store), //nolint:gosec // no disk is that large
	}, nil
}
