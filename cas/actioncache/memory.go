package actioncache

import (
	"container/list"
	"sync"
	"time"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// memory keeps entries that were read or written a short time ago, with the blobs that have to be
// there. Get still asks for those on every hit.
//
// It is current because the broker tells every change of the bucket after the change can be read,
// with its sequence (see Run). A slot has the newest sequence that is known of its action, and a
// value only if that is the value with this sequence. So whichever comes first of an answer of the
// broker, the news of a change and this process' own write, an older value never takes the place of a
// newer one. What was lost in a gap of the news can't be known by sequences: a gap empties the memory
// and begins a new epoch, and what was asked for in an older epoch is not kept. Slots also have an age,
// which bounds how long changes without news (messages that an operator deletes) go unseen.
type memory struct {
	limit int64 // bytes
	age   time.Duration

	mu     sync.Mutex                      // guards all below
	live   bool                            // whether news arrive
	epoch  uint64                          // counts the times that it was emptied
	bytes  int64                           // of all slots
	slots  map[digest.Digest]*list.Element // of *slot
	recent list.List                       // the slots, last used first
	hits   uint64
}

// slot is what is known of an action's entry.
type slot struct {
	action   digest.Digest
	sequence uint64
	read     time.Time // before the broker was asked
	value    *known    // nil when only the sequence is known
	bytes    int64
}

// known is an entry that was found well formed. Nobody changes it.
type known struct {
	entry
	result []byte          // the serialized ActionResult
	blobs  []digest.Digest // what has to be present
	whole  bool            // whether those are all; they may be too many to be kept
}

const (
	slotBytes = 300 // of a slot without a value: struct, map and list
	blobBytes = 64  // of a digest besides its hash
)

func (k *known) bytes() int64 {
	if k == nil {
		return 0
	}
	n := int64(len(k.value))
	if k.value[0] != formInline { // else they share the bytes
		n += int64(len(k.result))
	}
	for _, d := range k.blobs {
		n += blobBytes + int64(len(d.Hash()))
	}
	return n
}

func newMemory(limit int64, age time.Duration) *memory {
	return &memory{limit: limit, age: age, slots: make(map[digest.Digest]*list.Element)}
}

// get returns the value for an action, or nil and the epoch in which it is to be asked for.
func (m *memory) get(action digest.Digest, now time.Time) (*known, uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.slots[action]
	if !ok {
		return nil, m.epoch
	}
	s := e.Value.(*slot) //nolint:forcetypeassert,errcheck // the list has nothing else
	if now.Sub(s.read) >= m.age {
		m.remove(e)
		return nil, m.epoch
	}
	if s.value == nil {
		return nil, m.epoch
	}
	m.recent.MoveToFront(e)
	m.hits++
	return s.value, m.epoch
}

// add keeps what the broker said, or acknowledged, when it was asked in this epoch and at this time.
// Without a value it keeps that there is a newer one than any with a lower sequence.
func (m *memory) add(action digest.Digest, sequence uint64, value *known, epoch uint64, asked time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.live || time.Since(asked) >= m.age {
		return
	}
	if epoch != m.epoch || value.bytes() > m.limit/16 {
		value = nil
	}
	if e, ok := m.slots[action]; ok {
		old := e.Value.(*slot) //nolint:forcetypeassert,errcheck // the list has nothing else
		if old.sequence > sequence || (old.sequence == sequence && value == nil) {
			return
		}
		m.remove(e)
	}
	s := &slot{action: action, sequence: sequence, read: asked, value: value, bytes: slotBytes + value.bytes()}
	m.slots[action] = m.recent.PushFront(s)
	m.bytes += s.bytes
	for m.bytes > m.limit {
		m.remove(m.recent.Back())
	}
}

// changed keeps that the entry of an action was written.
func (m *memory) changed(action digest.Digest, sequence uint64) {
	m.add(action, sequence, nil, 0, time.Now())
}

// doubt forgets the value for an action, which may or may not have been replaced.
func (m *memory) doubt(action digest.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.slots[action]; ok {
		s := e.Value.(*slot) //nolint:forcetypeassert,errcheck // the list has nothing else
		m.bytes -= s.value.bytes()
		s.value, s.bytes = nil, slotBytes
	}
}

func (m *memory) remove(e *list.Element) {
	s := m.recent.Remove(e).(*slot) //nolint:forcetypeassert,errcheck // the list has nothing else
	delete(m.slots, s.action)
	m.bytes -= s.bytes
}

// empty forgets everything, and keeps nothing from now on unless news arrive.
func (m *memory) empty(live bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.live = live
	m.epoch++
	m.bytes = 0
	m.recent.Init()
	clear(m.slots)
}

// usage returns how many bytes are kept, and how often a value was found.
func (m *memory) usage() (bytes int64, hits uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bytes, m.hits
}
