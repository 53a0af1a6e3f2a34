package frontend

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// The ways in which an upload ends without an error for its client.
var (
	// errPresent reports that the blob is in the store, whoever brought it.
	errPresent = errors.New("blob is already present")
	// errHalfClosed reports a client that closed its side without finish_write.
	errHalfClosed = errors.New("upload ended without finish_write")
)

// receiver is the half of a Write stream that an upload reads.
type receiver interface {
	RecvMsg(m any) error
}

// upload is the data of one Write stream as an io.Reader. It ends with io.EOF only after finish_write
// and, unless it is compressed, exactly size bytes; a client that breaks a rule, leaves or stalls is an
// error, so the store never sees a short blob as a whole one. Its errors wrap errInvalid, errHalfClosed, errPresent,
// errStalled or are the stream's own. It is used by one goroutine, which calls begin, start, then
// Read, and close at the end.
type upload struct {
	stream   receiver
	name     string
	size     int64 // of the blob
	most     int64 // the largest offset: size, or more when it is compressed
	offset   int64 // the write_offset that comes next
	received int64 // bytes
	message  writeRequest
	finished bool
	err      error
	ended    bool // io.EOF was returned: the whole upload was read

	present   func() error // errPresent when the blob has appeared
	nextLook  int64        // bytes received at which to ask present again
	noData    time.Duration
	idleSince time.Time // when the run of messages without data began
}

// begin receives the first message, of which nothing is checked yet.
func (u *upload) begin() (*writeRequest, error) {
	err := u.stream.RecvMsg(&u.message)
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: the stream ended without a message", errInvalid)
	}
	if err != nil {
		return nil, err
	}
	u.name = u.message.name
	return &u.message, nil
}

// start accepts the first message as the bytes from offset on of a blob of size bytes.
func (u *upload) start(offset, size int64) error {
	u.offset, u.size, u.most, u.nextLook = offset, size, size, presentEvery
	return u.accept()
}

// startCompressed accepts the first message as the beginning of a blob of size bytes that comes
// compressed: as what may be longer, by frames that hold nothing, but not for ever (row ZST-7).
func (u *upload) startCompressed(size int64) error {
	const slack = 1 << 20
	u.size, u.most, u.nextLook = size, 2*size+slack, presentEvery
	return u.accept()
}

// compressed tells that the bytes are not those of the blob.
func (u *upload) compressed() bool { return u.most != u.size }

// close gives back the buffers of the last message.
func (u *upload) close() { u.message.close() }

// Read implements io.Reader.
func (u *upload) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for u.message.data.Remaining() == 0 {
		if u.err == nil {
			u.err = u.next()
		}
		if u.err != nil {
			u.ended = errors.Is(u.err, io.EOF)
			return 0, u.err
		}
	}
	return u.message.data.Read(p)
}

// next receives one message.
func (u *upload) next() error {
	if u.finished {
		return io.EOF
	}
	if u.received >= u.nextLook {
		u.nextLook = u.received + presentEvery
		if err := u.present(); err != nil {
			return err
		}
	}
	err := u.stream.RecvMsg(&u.message)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w at byte %d of %d", errHalfClosed, u.offset, u.size)
	}
	if err != nil {
		return err
	}
	return u.accept()
}

// accept checks the message against what came before it.
func (u *upload) accept() error {
	m := &u.message
	if m.name != "" && m.name != u.name {
		return fmt.Errorf("%w: resource_name changed from %s to %s", errInvalid, digest.Quote(u.name), digest.Quote(m.name))
	}
	if m.offset != u.offset {
		return fmt.Errorf("%w: write_offset %d of %s, %d is next", errInvalid, m.offset, digest.Quote(u.name), u.offset)
	}
	n := int64(m.data.Remaining())
	switch {
	case n <= u.most-u.offset:
	case u.compressed():
		return fmt.Errorf("%w: %s has more than %d compressed bytes, too many for the %d bytes of its digest", errInvalid, digest.Quote(u.name), u.most, u.size)
	default:
		return fmt.Errorf("%w: %s has more data than the %d bytes of its digest", errInvalid, digest.Quote(u.name), u.size)
	}
	u.offset += n
	u.received += n
	u.finished = m.finish
	if u.finished && u.offset < u.size && !u.compressed() {
		return fmt.Errorf("%w: %s was finished after %d of %d bytes", errInvalid, digest.Quote(u.name), u.offset, u.size)
	}
	return u.progress(n)
}

// progress ends an upload that sends message after message without data (row X-32).
func (u *upload) progress(n int64) error {
	if n > 0 || u.finished {
		u.idleSince = time.Time{}
		return nil
	}
	now := time.Now()
	if u.idleSince.IsZero() {
		u.idleSince = now
	}
	if idle := now.Sub(u.idleSince); idle > u.noData {
		return fmt.Errorf("%w: %s had only empty messages for %v", errStalled, digest.Quote(u.name), idle.Round(time.Second))
	}
	return nil
}
