package objectstore

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// SubjectDisk is the core NATS subject on which a broker's process tells how much room it has.
const SubjectDisk = "jetfarm.cas.disk"

const (
	diskEvery = time.Second
	// diskStale is after which time a server that says nothing is forgotten.
	diskStale = 10 * diskEvery
)

// Disk is how much room a broker has for streams.
type Disk struct {
	Server string `json:"server"`
	// Free and Total are the bytes of its file system.
	Free  int64 `json:"free"`
	Total int64 `json:"total"`
	// Max is the most bytes of all its streams, and Used what they have.
	Max  int64 `json:"max"`
	Used int64 `json:"used"`
}

// TellDisk publishes what measure returns once a second until ctx ends.
func TellDisk(ctx context.Context, conn *nats.Conn, measure func() (Disk, error)) error {
	tick := time.NewTicker(diskEvery)
	defer tick.Stop()
	for {
		disk, err := measure()
		if err == nil {
			if data, err := json.Marshal(disk); err == nil {
				_ = conn.Publish(SubjectDisk, data) //nolint:errcheck // the next one may arrive
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// The free space below which nothing is stored is a twentieth of the disk and at most lowWater; it is
// stored again from half as much more on.
const (
	lowPart  = 20
	lowWater = 4 << 30
)

func (d Disk) low() int64  { return min(d.Total/lowPart, lowWater) }
func (d Disk) high() int64 { return d.low() + d.low()/2 }

// Share is how much of a broker's room is for blobs: the action cache and the records of operations
// need some as well.
func Share(most int64) int64 {
	const others = 1 << 30
	return most - min(most/2, others+most/16)
}

// disks is what the brokers have told.
type disks struct {
	mu    sync.Mutex
	known map[string]heard // guarded by mu
}

// heard is what a broker has told, and what the streams had then.
type heard struct {
	Disk
	stored int64
	at     time.Time
}

// maxMargin is which part of a broker's room is kept free of blobs.
const maxMargin = 64

// maxServers bounds the brokers of a cluster.
const maxServers = 100

func (x *disks) hear(data []byte, stored int64, now time.Time) {
	var d Disk
	if json.Unmarshal(data, &d) != nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.known == nil {
		x.known = make(map[string]heard)
	}
	if _, ok := x.known[d.Server]; ok || len(x.known) < maxServers {
		x.known[d.Server] = heard{d, stored, now}
	}
}

// all are those who have told something of late.
func (x *disks) all(now time.Time) []heard {
	x.mu.Lock()
	defer x.mu.Unlock()
	var all []heard
	for name, h := range x.known {
		if now.Sub(h.at) > diskStale {
			delete(x.known, name)
			continue
		}
		all = append(all, h)
	}
	return all
}
