package frontend

import (
	"container/list"
	"encoding/hex"
	"fmt"
	"sync"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/semaphore"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/chunking"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// chunker is what the calls about chunks share. Which chunks a blob has is not stored anywhere: it
// follows from the blob and the parameters, so it is computed when it is asked for, and every frontend
// finds the same. What is computed stays in memory, since the blobs that one client asks for are those
// that the next one asks for; it is believed only as long as the store has every chunk. The rejected
// alternative, lists as blobs or entries of a bucket, has to be evicted with the blobs, and saves a read
// of the blob after a restart only. Lists of clients that cut with another function are verified and
// then forgotten.
type chunker struct {
	blobs  cas.Store
	limits Limits
	cutter *chunking.Chunker
	slots  *semaphore.Weighted // of the calls that read blobs
	known  *mappings
}

// newChunker returns nil when chunks are turned off.
func newChunker(blobs cas.Store, limits Limits, params *chunking.Params) *chunker {
	if params == nil {
		return nil
	}
	return &chunker{
		blobs: blobs, limits: limits, cutter: chunking.New(*params),
		slots: semaphore.NewWeighted(int64(limits.ChunkCalls)), known: newMappings(limits.KnownChunks),
	}
}

// cutWith is the chunking function of every list that is computed here.
const cutWith = repb.ChunkingFunction_FAST_CDC_2020

// errNoChunks is the answer to calls that are not offered (row CHK-1).
func errNoChunks() error {
	return fmt.Errorf("%w: the capabilities say that blobs are neither split nor spliced here", errUnimplemented)
}

// digestList is a list of digests of one space in little memory.
type digestList struct {
	space  digest.Space
	hashes []byte
	sizes  []int64
	total  int64 // the sum of the sizes
}

// add appends d, whose size must not make the total overflow.
func (l *digestList) add(d digest.Digest) {
	l.hashes, _ = hex.AppendDecode(l.hashes, []byte(d.Hash())) //nolint:errcheck // A Digest has hex.
	l.sizes = append(l.sizes, d.Size())
	l.total += d.Size()
}

func (l *digestList) len() int { return len(l.sizes) }

// slice returns the digests from i up to j.
func (l *digestList) slice(i, j int) []digest.Digest {
	width := l.space.Function().HexLen() / 2
	ds := make([]digest.Digest, 0, j-i)
	for ; i < j; i++ {
		d, err := l.space.New(hex.EncodeToString(l.hashes[i*width:(i+1)*width]), l.sizes[i])
		if err != nil {
			panic("a digest that was well formed is not any more: " + err.Error())
		}
		ds = append(ds, d)
	}
	return ds
}

// pages calls f with all digests, at most n at a time.
func (l *digestList) pages(n int, f func([]digest.Digest) error) error {
	for i := 0; i < l.len(); i += n {
		if err := f(l.slice(i, min(i+n, l.len()))); err != nil {
			return err
		}
	}
	return nil
}

// mappings are the lists that were computed, the most recently used of them.
type mappings struct {
	most int // digests in all lists together

	mu    sync.Mutex // guards what follows
	byKey map[digest.Digest]*list.Element
	order *list.List // of mapping, the newest first
	held  int
}

type mapping struct {
	blob   digest.Digest
	chunks *digestList
}

func newMappings(most int) *mappings {
	return &mappings{most: most, byKey: make(map[digest.Digest]*list.Element), order: list.New()}
}

// get returns the chunks of a blob, which nobody may change, or nil.
func (m *mappings) get(d digest.Digest) *digestList {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.byKey[d]
	if !ok {
		return nil
	}
	m.order.MoveToFront(e)
	if held, ok := e.Value.(mapping); ok {
		return held.chunks
	}
	return nil
}

// put keeps a list unless it is a large part of what may be kept.
func (m *mappings) put(d digest.Digest, chunks *digestList) {
	if chunks.len() > m.most/4 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.byKey[d]; ok {
		m.drop(e)
	}
	m.byKey[d] = m.order.PushFront(mapping{blob: d, chunks: chunks})
	for m.held += 1 + chunks.len(); m.held > m.most; {
		m.drop(m.order.Back())
	}
}

// drop forgets a list; m.mu must be held.
func (m *mappings) drop(e *list.Element) {
	if old, ok := m.order.Remove(e).(mapping); ok {
		delete(m.byKey, old.blob)
		m.held -= 1 + old.chunks.len()
	}
}
