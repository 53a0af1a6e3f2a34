package objectstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// windowChunks is the size of one window of a read in chunks. A reader holds two windows at most:
// the one it reads and the one that arrives meanwhile.
const windowChunks = 4

// findObject returns the large blob if this bucket has it. A replica that lacks it is doubted if the
// caller says so, and then the leader is asked.
func (s *Store) findObject(ctx context.Context, b *bucket, d digest.Digest, doubt bool) (object, error) {
	m, err := s.bulk.last(ctx, b.stream, b.meta(d))
	if errors.Is(err, cas.ErrNotFound) && doubt {
		m, err = s.bulk.lastFromLeader(ctx, b.stream, b.meta(d))
	}
	if err != nil {
		return object{}, err
	}
	o, err := decodeObject(b, d, m)
	if err != nil {
		return object{}, fmt.Errorf("%w: %w", cas.ErrNotFound, err)
	}
	return o, nil
}

// openLarge returns a reader of the blob if this bucket has it. The first window is already asked
// for.
func (s *Store) openLarge(ctx context.Context, b *bucket, d digest.Digest, from span, known bool) (io.ReadCloser, error) {
	o, err := s.findObject(ctx, b, d, s.doubts(known))
	if err != nil {
		return nil, err
	}
	s.index.set(keyOf(d), newEntry(b, d.Size()))
	r, err := s.newLargeReader(ctx, b, d, o)
	if err != nil {
		return nil, err
	}
	r.chunks, r.left, r.frames = chunksOf(d), d.Size()-from.offset, from.frames
	passed := from.frames && o.zstd // nothing to hash, see OpenFrames
	if from.offset == 0 && !passed {
		r.hash = newAsideHash(d.Space().Function())
	}
	r.discard = func(how string) error {
		s.discard(ctx, r.bucket, d, r.object.sequence)
		return fmt.Errorf("%w: blob %v is damaged: %s", cas.ErrMismatch, d, how)
	}
	r.count = func(n int) { s.metrics.readBytes.Add(float64(n)) }
	r.find = func(cause error) (*bucket, object, error) { return s.moved(ctx, r.bucket, d, cause) }
	s.readers.add(r, d)
	r.done = func() { s.readers.remove(r) }
	if err := r.start(from.offset); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// newLargeReader returns a reader without range and verdict, which are the caller's to set.
func (s *Store) newLargeReader(ctx context.Context, b *bucket, d digest.Digest, o object) (*largeReader, error) {
	arriving := make(chan *nats.Msg, 4*(windowChunks+1)) // two windows, and as many after a move
	inbox := s.bulk.conn.NewInbox()
	sub, err := s.bulk.conn.ChanSubscribe(inbox+".*", arriving)
	if err != nil {
		return nil, brokerError(ctx, err)
	}
	r := &largeReader{digest: d, bucket: b, object: o, inbox: inbox, sub: sub, count: func(int) {}, done: func() {}}
	r.find = func(cause error) (*bucket, object, error) { return nil, object{}, cause }
	r.ask = func(reply string, request []byte) error {
		return brokerError(ctx, s.bulk.conn.PublishRequest("$JS.API.DIRECT.GET."+r.bucket.stream, reply, request))
	}
	r.receive = func() (*nats.Msg, error) { return receive(ctx, arriving, s.cfg.StallTimeout) }
	r.leader = func(after uint64) (stored, error) {
		return s.bulk.nextFromLeader(ctx, r.bucket.stream, r.object.chunks, after+1)
	}
	return r, nil
}

// receive returns the next message, or cas.ErrUnavailable when none comes within stall.
func receive(ctx context.Context, arriving <-chan *nats.Msg, stall time.Duration) (*nats.Msg, error) {
	select {
	case m := <-arriving:
		return m, nil
	default:
	}
	timer := time.NewTimer(stall)
	defer timer.Stop()
	select {
	case m := <-arriving:
		return m, nil
	case <-timer.C:
		return nil, fmt.Errorf("%w: the broker was silent for %v", cas.ErrUnavailable, stall)
	case <-ctx.Done():
		return nil, ended(ctx)
	}
}

// window is a run of chunks that one request asks for.
type window struct {
	next, end int // the chunks to be delivered yet: [next, end)
	reply     string
	arrived   []*nats.Msg
	complete  bool   // the broker has nothing more to send for this request
	after     uint64 // the sequence before the chunk next
}

// largeReader reads the chunks of a large blob in windows of direct gets, one window ahead. It
// belongs to one goroutine.
type largeReader struct {
	digest digest.Digest
	bucket *bucket
	object object
	hash   *asideHash // nil unless the read began at 0
	inbox  string
	sub    *nats.Subscription

	// These are bound to the context of Open.
	ask     func(reply string, request []byte) error
	receive func() (*nats.Msg, error)
	leader  func(after uint64) (stored, error)
	// discard makes the store forget what is damaged, and returns the error of the read.
	discard func(how string) error
	count   func(n int)
	// find returns where the blob is when its generation was dropped, and else the error.
	find func(cause error) (*bucket, object, error)
	done func() // when nobody reads any more

	moves   int       // to other generations
	chunks  int       // to be read, from the first of the blob on
	last    uint64    // the sequence of the chunk before the first that was not asked for, unless positions tell
	asked   int       // the first chunk that was not asked for
	windows []*window // at most two
	frames  bool      // to be delivered in place of bytes
	plain   []byte    // memory for a chunk that is stored compressed
	frame   []byte    // memory for a frame that is made here
	chunk   []byte    // what is left of the chunk being read
	skip    int64     // bytes to drop before the first one that was wanted
	left    int64     // bytes of the blob to deliver in further chunks
	err     error     // how the read ended
}

// start asks for the first windows.
func (r *largeReader) start(offset int64) error {
	if r.left == 0 {
		r.err = io.EOF
		if r.frames {
			r.chunk = compress.Append(nil, nil)
		}
		return nil
	}
	r.asked = int(offset / chunkSize)
	r.skip = offset % chunkSize
	return r.askAhead()
}

// askAhead keeps two windows under way, or one when the positions of the chunks are not known.
func (r *largeReader) askAhead() error {
	for len(r.windows) < 2 && r.asked < r.chunks {
		w := &window{next: r.asked, end: min(r.asked+windowChunks, r.chunks)}
		// What was asked for before a move may still be answered.
		w.reply = r.inbox + "." + strconv.Itoa(r.moves) + "-" + strconv.Itoa(w.next)
		if len(r.object.positions) > 0 {
			w.after = r.object.positions[w.next] - 1
		} else if len(r.windows) > 0 {
			break
		} else {
			w.after = r.last
		}
		request, err := json.Marshal(map[string]any{
			"seq":          w.after + 1,
			"next_by_subj": r.object.chunks,
			"batch":        w.end - w.next,
			"max_bytes":    (w.end - w.next) * 2 * chunkSize,
		})
		if err != nil {
			return err
		}
		if err := r.ask(w.reply, request); err != nil {
			return err
		}
		r.windows = append(r.windows, w)
		r.asked = w.end
	}
	return nil
}

// advance makes the next chunk the current one.
func (r *largeReader) advance() error {
	m, err := r.obtain(r.windows[0])
	for err != nil && !errors.Is(err, cas.ErrNotFound) {
		if err = r.move(err); err != nil {
			return err
		}
		m, err = r.obtain(r.windows[0])
	}
	if err != nil {
		return r.discard("a chunk is missing")
	}
	w := r.windows[0]
	w.after = m.sequence
	if err := checkChunk(m.header, w.next, m.data); err != nil {
		return r.discard(err.Error())
	}
	if err := r.take(m, min(chunkSize, r.digest.Size()-int64(w.next)*chunkSize)); err != nil {
		return err
	}
	w.next++
	if w.next == w.end {
		r.windows, r.last = r.windows[1:], w.after
		if err := r.askAhead(); err != nil {
			return err
		}
	}
	return nil
}

// obtain waits for the next chunk of a window.
func (r *largeReader) obtain(w *window) (stored, error) {
	for len(w.arrived) == 0 && !w.complete {
		m, err := r.receive()
		if err != nil {
			return stored{}, err
		}
		if err := r.sort(m); err != nil {
			return stored{}, err
		}
	}
	return r.next(w)
}

// move goes on at the same chunk in another generation, if that is what the error was about.
func (r *largeReader) move(cause error) error {
	b, o, err := r.find(cause)
	if err != nil {
		return err
	}
	if r.frames && o.zstd {
		r.hash = nil // as for any read of frames that are passed on
	}
	r.bucket, r.object = b, o
	r.moves++
	r.asked, r.windows = r.windows[0].next, nil
	return r.askAhead()
}

// take makes a stored chunk of so many bytes the current one.
func (r *largeReader) take(m stored, size int64) error {
	drop := min(r.skip, size)
	give := min(size-drop, r.left)
	r.skip, r.left = r.skip-drop, r.left-give
	r.count(int(give))
	if r.frames && give == size && isZstd(m.header) {
		r.chunk = m.data
		return nil
	}
	if r.hash != nil {
		r.hash.wait() // it may be reading r.plain
	}
	data, err := unpack(r.plain[:0], m.header, m.data, size)
	if err != nil {
		return r.discard("a chunk is not as it was stored: " + err.Error())
	}
	if isZstd(m.header) {
		r.plain = data
	}
	if r.hash != nil {
		r.hash.write(data)
	}
	r.chunk = data[drop : drop+give]
	if r.frames {
		r.frame = compress.Append(r.frame[:0], r.chunk)
		r.chunk = r.frame
	}
	return nil
}

// next takes a chunk from its window.
func (r *largeReader) next(w *window) (stored, error) {
	if len(w.arrived) == 0 {
		// The replica that answered lacks the chunk. It may lag behind; the leader does not.
		return r.leader(w.after)
	}
	m := w.arrived[0]
	w.arrived = w.arrived[1:]
	sequence, err := strconv.ParseUint(header(m, jetstream.SequenceHeader), 10, 64)
	if err != nil {
		return stored{}, fmt.Errorf("%w: a chunk came without a sequence", cas.ErrUnavailable)
	}
	return stored{sequence: sequence, header: m.Header, data: m.Data}, nil
}

// sort gives a message to its window. One of a window that is done is dropped.
func (r *largeReader) sort(m *nats.Msg) error {
	for _, w := range r.windows {
		if w.reply != m.Subject {
			continue
		}
		status := header(m, "Status")
		switch status {
		case "":
			w.arrived = append(w.arrived, m)
		case "204", "404":
			w.complete = true
		case "503":
			return fmt.Errorf("%w: %w", cas.ErrUnavailable, nats.ErrNoResponders)
		default:
			return directError(status, m)
		}
	}
	return nil
}

// fill sees to it that there are bytes to deliver, or returns how the read ended.
func (r *largeReader) fill() error {
	for len(r.chunk) == 0 && r.err == nil {
		if r.left > 0 {
			r.err = r.advance()
		} else {
			r.err = r.verdict()
		}
	}
	return r.err
}

// verdict is io.EOF unless the bytes do not have the digest.
func (r *largeReader) verdict() error {
	if r.hash != nil && r.hash.sum(r.digest.Space(), r.digest.Size()) != r.digest {
		return r.discard("it has another hash")
	}
	return io.EOF
}

func (r *largeReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.chunk)
	r.chunk = r.chunk[n:]
	return n, nil
}

func (r *largeReader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		err := r.fill()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(r.chunk)
		r.chunk = r.chunk[n:]
		total += int64(n)
		if err == nil && len(r.chunk) > 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return total, err
		}
	}
}

// Close ends the read. It may be called again.
func (r *largeReader) Close() error {
	if r.sub == nil {
		return nil
	}
	r.done()
	if r.hash != nil {
		r.hash.wait()
	}
	if r.err == nil {
		r.err = fmt.Errorf("read of %v after Close", r.digest)
	}
	r.chunk, r.windows = nil, nil
	err := r.sub.Unsubscribe()
	r.sub = nil
	if errors.Is(err, nats.ErrConnectionClosed) {
		return nil
	}
	return err
}
