package upstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

const (
	// windowBytes is how much of a fetch is kept in memory for readers that are behind.
	windowBytes = 2 << 20
	// patience is how long one fetch waits for slow readers, all in all, before they are set aside.
	patience = 5 * time.Second
)

// errAside reports a reader that is not served from the window any more.
var errAside = errors.New("the reader goes on from the stored blob")

// A window passes the bytes of a fetch on to its readers while they are stored, and keeps the last
// of them for those that are behind. Readers that are too far behind for too long are set aside, so
// that they hold up nobody for ever.
type window struct {
	patience time.Duration // what is left of it; belongs to the writer

	mu      sync.Mutex // guards the rest
	chunks  [][]byte   // what readers may still want; never changed once written
	base    int64      // offset of chunks[0]
	end     int64      // offset behind the last byte written
	readers map[*tail]struct{}
	changed chan struct{} // closed and replaced with every change
	shut    bool          // takes no more readers
	over    bool          // the source has ended
	err     error         // why it is over; nil for a blob that is whole and verified
}

// A tail is one reader of a window.
type tail struct{ at int64 } // guarded by window.mu

func newWindow(patience time.Duration) *window {
	return &window{patience: patience, readers: make(map[*tail]struct{}), changed: make(chan struct{})}
}

// attach returns a reader from an offset on, or nil when that is not in the window any more.
func (w *window) attach(offset int64) *tail {
	w.mu.Lock()
	defer w.mu.Unlock()
	if offset < w.base || w.shut || w.over {
		return nil
	}
	t := &tail{at: offset}
	w.readers[t] = struct{}{}
	return t
}

// detach forgets a reader.
func (w *window) detach(t *tail) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.readers, t)
	w.trim()
}

// position is the offset that a reader reads next.
func (w *window) position(t *tail) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return t.at
}

// aside sets every reader aside, also those who would still come.
func (w *window) aside() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.shut = true
	clear(w.readers)
	w.trim()
}

// whole tells whether all of the blob has come and was verified.
func (w *window) whole() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.over && w.err == nil
}

// wanted tells whether anybody reads.
func (w *window) wanted() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.readers) > 0
}

// trim drops what no reader wants, but for the last of it, which lets others join, and wakes all who
// wait. w.mu must be held.
func (w *window) trim() {
	first := w.end - max(w.lag(), windowBytes)
	for len(w.chunks) > 0 && w.base+int64(len(w.chunks[0])) <= first {
		w.base += int64(len(w.chunks[0]))
		w.chunks[0] = nil
		w.chunks = w.chunks[1:]
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

// lag is how far the slowest reader is behind. w.mu must be held.
func (w *window) lag() (lag int64) {
	for t := range w.readers {
		lag = max(lag, w.end-t.at)
	}
	return lag
}

// write adds bytes, and waits for readers when they are a whole window behind, while there is
// patience. It returns how many readers were set aside.
func (w *window) write(ctx context.Context, p []byte) (slow int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		lag := w.lag()
		if lag == 0 || lag+int64(len(p)) <= windowBytes {
			break
		}
		if w.patience > 0 && ctx.Err() == nil {
			w.await(ctx)
			continue
		}
		for t := range w.readers {
			if w.end-t.at == lag {
				delete(w.readers, t)
				slow++
			}
		}
	}
	if len(w.readers) > 0 {
		w.chunks = append(w.chunks, bytes.Clone(p))
	} else {
		w.chunks, w.base = nil, w.end+int64(len(p))
	}
	w.end += int64(len(p))
	w.trim()
	return slow
}

// await waits for a change while there is patience, with w.mu open.
func (w *window) await(ctx context.Context) {
	changed := w.changed
	w.mu.Unlock()
	defer w.mu.Lock()
	begun := time.Now()
	timer := time.NewTimer(w.patience)
	defer timer.Stop()
	select {
	case <-changed:
		w.patience -= time.Since(begun)
	case <-timer.C:
		w.patience = 0
	case <-ctx.Done():
	}
}

// finish ends the window: with nil when the blob is whole and verified.
func (w *window) finish(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		w.over, w.err = true, err
	}
	w.trim()
}

// next returns the next bytes for a reader, which must not be changed. io.EOF is the end of a whole
// blob, errAside means that the reader has to get the rest elsewhere.
func (w *window) next(ctx context.Context, t *tail) ([]byte, error) {
	for {
		w.mu.Lock()
		data, ready, err := w.take(t)
		changed := w.changed
		w.mu.Unlock()
		if ready {
			return data, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// take is next without waiting. w.mu must be held.
func (w *window) take(t *tail) (data []byte, ready bool, err error) {
	if _, attached := w.readers[t]; !attached {
		return nil, true, errAside
	}
	if t.at < w.end {
		at := w.base
		for _, chunk := range w.chunks {
			if t.at < at+int64(len(chunk)) {
				data = chunk[t.at-at:]
				break
			}
			at += int64(len(chunk))
		}
		t.at += int64(len(data))
		w.trim()
		return data, true, nil
	}
	if !w.over {
		return nil, false, nil
	}
	if w.err != nil {
		return nil, true, w.err
	}
	return nil, true, io.EOF
}
