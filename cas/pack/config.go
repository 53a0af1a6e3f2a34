package pack

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

const (
	// MaxBlob is the size of the largest blob that is kept.
	MaxBlob = 64 << 10
	// MinBytes is the smallest pack there can be.
	MinBytes = 16 << 20
)

// Config is what Open needs.
type Config struct {
	// Dir is the pack's own directory. It is made when it does not exist, and one process uses it at a
	// time.
	Dir string
	// MaxBytes bounds all files in Dir. It holds at most one blob for each 2 KiB of it, so that blobs
	// that are smaller do not take more memory: about 17 bytes for each KiB of MaxBytes.
	MaxBytes int64
	Log      *slog.Logger
	// Registerer gets the metrics; nil is none.
	Registerer prometheus.Registerer
	// Room tells how many bytes the disk has and how many are free; nil asks the disk.
	Room func() (total, free int64, err error)
}

func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" || c.Log == nil {
		return c, errors.New("pack: a directory and a logger are needed")
	}
	if c.MaxBytes < MinBytes {
		return c, fmt.Errorf("pack: %d bytes are less than %d", c.MaxBytes, MinBytes)
	}
	if c.Room == nil {
		c.Room = func() (total, free int64, err error) {
			var fs unix.Statfs_t
			err = unix.Statfs(c.Dir, &fs)
			return int64(fs.Blocks) * fs.Bsize, int64(fs.Bavail) * fs.Bsize, err //nolint:gosec // no disk is that large
		}
	}
	return c, nil
}

// The size of a segment is a sixteenth of the pack, in these bounds.
const (
	parts      = 16
	maxSegment = 64 << 20
	// perBlob is for how many bytes of a segment one blob is kept at most.
	perBlob = 2 << 10
	// maxSegments bounds the open files. Every start of the process makes one.
	maxSegments = 1024
)

func segmentSize(maxBytes int64) int64 { return min(maxBytes/parts, maxSegment) }
