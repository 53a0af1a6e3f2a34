package pack

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/keymap"
)

// Pack is small blobs in files. Open makes one, Run gives it room, and Close ends it.
//
// Its mutex is never held across a system call. A write takes its part of the segment under the mutex
// and is findable when it is done, so a kill leaves at most a gap where writes were under way.
type Pack struct {
	cfg     Config
	segment int64 // the size of one
	lock    *os.File
	metrics *metrics
	table   table
	wake    chan struct{} // has room for one; Run has something to do

	mu       sync.RWMutex // guards the rest
	segments []*segment   // oldest first, the last is written to
	spare    *segment     // the next one, or nil
	last     uint64       // the number of the newest segment
	pause    time.Time    // nothing is written before
	failure  error        // why, until tend has logged it
}

// maxWrite bounds what is written with one call.
const maxWrite = 1 << 20

// pauseAfterError is for how long nothing is written after a write that failed.
const pauseAfterError = 10 * time.Second

// Get returns the bytes of a blob, which have its digest and belong to the caller.
func (p *Pack) Get(d digest.Digest) (data []byte, ok bool) {
	if !takes(d) {
		return nil, false
	}
	k := keymap.Of(d)
	at := p.table.get(k)
	s := p.find(at)
	if s == nil || at.size() != d.Size() {
		p.metrics.misses.Inc()
		return nil, false
	}
	data = make([]byte, d.Size())
	_, err := s.file.ReadAt(data, at.offset()+headerSize)
	switch {
	case errors.Is(err, os.ErrClosed): // it was dropped meanwhile
		p.metrics.misses.Inc()
		return nil, false
	case err != nil || d.Space().Of(data) != d:
		p.table.remove(k, at)
		p.metrics.damaged.Inc()
		p.metrics.misses.Inc()
		return nil, false
	}
	p.metrics.hits.Inc()
	return data, true
}

func takes(d digest.Digest) bool { return d.Size() > 0 && d.Size() <= MaxBlob }

// find returns the segment of a place, or nil.
func (p *Pack) find(at place) *segment {
	if at == 0 {
		return nil
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	for _, s := range slices.Backward(p.segments) {
		if s.number&numberMask == at.number() {
			return s
		}
	}
	return nil
}

// Add keeps copies of blobs that are not kept yet, as far as there is room at once. The bytes need not
// be verified: those that do not have their digest are never given out.
func (p *Pack) Add(ds []digest.Digest, data [][]byte) {
	most := min(maxWrite, p.segment/4)
	var w write
	var keys keymap.Keyer
	for i, d := range ds {
		if !takes(d) || int64(len(data[i])) != d.Size() {
			continue
		}
		k := keys.Of(d)
		if at := p.table.get(k); at.size() == d.Size() {
			continue
		}
		size := recordSize(d.Size())
		if int64(len(w.buffer))+size > most {
			p.write(w)
			w = write{}
		}
		if w.buffer == nil {
			w.buffer = make([]byte, 0, min(size*int64(len(ds)-i), most))
		}
		w.places = append(w.places, keyed{k, newPlace(0, int64(len(w.buffer)), d.Size())})
		w.buffer = appendRecord(w.buffer, k, data[i])
	}
	if len(w.places) > 0 {
		p.write(w)
	}
}

// write is records to be written with one call, and where in the buffer each is.
type write struct {
	buffer []byte
	places []keyed
}

type keyed struct {
	key   keymap.Key
	place place
}

func (p *Pack) write(w write) {
	s, offset := p.reserve(int64(len(w.buffer)), int64(len(w.places)))
	if s == nil {
		p.metrics.skipped.Add(float64(len(w.places)))
		return
	}
	if _, err := s.file.WriteAt(w.buffer, offset); err != nil {
		if !errors.Is(err, os.ErrClosed) {
			p.failed(err)
		}
		p.metrics.skipped.Add(float64(len(w.places)))
		return
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	if s.dropped {
		return
	}
	for _, at := range w.places {
		p.table.set(at.key, newPlace(s.number, offset+at.place.offset(), at.place.size()))
	}
}

// reserve takes room for records, or returns nil when there is none.
func (p *Pack) reserve(size, records int64) (*segment, int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Now().Before(p.pause) {
		return nil, 0
	}
	var s *segment
	if n := len(p.segments); n > 0 {
		s = p.segments[n-1]
	}
	if s == nil || s.full || s.size+size > p.segment || (s.records+records)*perBlob > p.segment {
		wake(p.wake)
		if p.spare == nil {
			return nil, 0
		}
		s, p.spare = p.spare, nil
		p.segments = append(p.segments, s)
	}
	offset := s.size
	s.size += size
	s.records += records
	return s, offset
}

// failed ends the segment that could not be written to, whose records after the gap a start would not
// find, and writes nothing for a while.
func (p *Pack) failed(err error) {
	p.mu.Lock()
	p.pause = time.Now().Add(pauseAfterError)
	if n := len(p.segments); n > 0 {
		p.segments[n-1].full = true
	}
	p.failure = err
	p.mu.Unlock()
	wake(p.wake)
	p.metrics.failures.Inc()
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Close writes what a start needs to find everything again, and lets another process use the directory.
// The pack must not be in use any more. Where the table cannot be written, the next start reads records.
func (p *Pack) Close() error {
	err := p.writeTables(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.segments {
		err = errors.Join(err, s.file.Close())
	}
	if p.spare != nil {
		err = errors.Join(err, p.spare.file.Close(), removeFile(p.path(p.spare.number, recordsKind)))
	}
	if err := errors.Join(err, p.lock.Close()); err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	return nil
}
