package disk

import (
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// fetches is how many reads of the source go on at once.
const fetches = 64

// Config is what Open needs.
type Config struct {
	// Dir is the tier's own directory. It is made when it does not exist, and one process uses it at
	// a time.
	Dir string
	// MaxBytes bounds the files in Dir, in whole blocks of 4 KiB, with those being fetched. It may be
	// exceeded by 5 %.
	MaxBytes int64
	// SecondRead makes the tier fetch a blob below 4 MiB when it is read for the second time, and not for
	// the first: where the source is in the same process, to make a file takes as long as to read the blob.
	SecondRead bool
	// Verified says that the source itself compares what it reads from the start of a blob with the
	// digest. Then the tier does not hash it again.
	Verified bool
	// Source is where blobs come from and go to.
	Source cas.Store
	Log    *slog.Logger
	// Registerer gets the metrics; nil is none.
	Registerer prometheus.Registerer
}

// Tier is a byte-bounded cache of a store in a directory, least recently used first out. It is
// itself a cas.Store: reads are served from files where they are held, writes and the question
// what is missing go to the source, because only that makes blobs durable (audit row 15).
//
// Its mutex is never held across a system call. A lookup and the decision who fetches are one
// critical section, so that a blob is fetched once however many ask for it.
type Tier struct {
	source  cas.Store
	log     *slog.Logger
	metrics *metrics
	max     int64
	dir     string
	lock    *os.File // the flock on dir
	asRoot  bool
	second  bool // Config.SecondRead
	believe bool // Config.Verified

	trusted     uint64        // generations below it are from before the machine's last boot
	generations atomic.Uint64 // the last one given out
	fetching    chan struct{} // a token for each fetch
	pressure    chan struct{} // wakes Run
	buffers     buffers

	mu       sync.Mutex // guards the rest
	index    *index
	reserved int64 // the costs of files that are being written
	flights  map[key]*flight
	lately   admission
}

var (
	_ cas.Store     = (*Tier)(nil)
	_ cas.Confirmer = (*Tier)(nil)
	_ cas.Resumer   = (*Tier)(nil)
	_ cas.Sizer     = (*Tier)(nil)

	_ cas.FrameOpener = (*Tier)(nil)
	_ cas.BatchPutter = (*Tier)(nil)
	_ cas.BatchReader = (*Tier)(nil)
)

// Run evicts in the background, so that only a sudden flood makes callers evict. It returns nil
// when ctx ends.
func (t *Tier) Run(ctx context.Context) error {
	for {
		t.trim(ctx, t.max, t.max-t.max/20)
		select {
		case <-ctx.Done():
			return nil
		case <-t.pressure:
		}
	}
}

// Close lets another process use the directory. The tier must not be in use any more.
func (t *Tier) Close() error { return t.lock.Close() }

// keyOf returns the key of a blob; t.mu must be held.
func (t *Tier) keyOf(d digest.Digest, executable bool) key {
	k := key{space: t.index.space(d.Space()), executable: executable}
	hash := d.Hash()
	_, _ = hex.Decode(k.hash[:], []byte(hash[:min(len(hash), 2*len(k.hash))])) //nolint:errcheck // A Digest has hex.
	return k
}

// path returns where the file of e is.
func (t *Tier) path(e entry) string {
	t.mu.Lock()
	space := t.index.spaces[e.key.space]
	t.mu.Unlock()
	return t.dir + "/cas/" + fileName(space, e)
}

// temp creates a file in tmp that only this process can read.
func (t *Tier) temp() (*os.File, error) {
	name := t.dir + "/tmp/" + hexUint(t.generations.Add(1))
	return os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
}

// reserve takes the room for a file of size bytes before it is written. Above the high water mark
// Run is woken; above 105 % the caller evicts.
func (t *Tier) reserve(ctx context.Context, size int64) {
	t.mu.Lock()
	t.reserved += cost(size)
	total := t.index.used + t.reserved
	t.mu.Unlock()
	if total > t.max {
		select {
		case t.pressure <- struct{}{}:
		default:
		}
	}
	t.trim(ctx, t.max+t.max/20, t.max)
}

// release gives the room back when the file was not written.
func (t *Tier) release(size int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reserved -= cost(size)
}

// insert makes a file that has room reserved findable. What it replaces is deleted.
func (t *Tier) insert(ctx context.Context, e entry) {
	t.mu.Lock()
	t.reserved -= cost(e.size)
	old, replaced := t.index.insert(e)
	t.mu.Unlock()
	if replaced {
		t.unlink(ctx, old)
	}
}

// drop forgets a file and deletes it, unless the key has another generation by now.
func (t *Tier) drop(ctx context.Context, e entry) {
	t.mu.Lock()
	removed := t.index.remove(e)
	t.mu.Unlock()
	if removed {
		t.unlink(ctx, e)
	}
}

// trim evicts the oldest files down to low when there is more than high. It finds its victims a
// few at a time under the mutex and deletes them without.
func (t *Tier) trim(ctx context.Context, high, low int64) {
	for {
		victims := t.victims(high, low)
		if len(victims) == 0 {
			return
		}
		for _, e := range victims {
			t.unlink(ctx, e)
		}
		t.metrics.evictions.Add(float64(len(victims)))
		high = low
	}
}

func (t *Tier) victims(high, low int64) []entry {
	const batch = 64
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.index.used+t.reserved <= high {
		return nil
	}
	var victims []entry
	for len(victims) < batch && t.index.used+t.reserved > low {
		e, ok := t.index.oldest()
		if !ok {
			break
		}
		t.index.remove(e)
		victims = append(victims, e)
	}
	return victims
}

func (t *Tier) unlink(ctx context.Context, e entry) {
	if err := os.Remove(t.path(e)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.log.ErrorContext(ctx, "cached file cannot be deleted", "file", filepath.Base(t.path(e)), "err", err)
	}
}
