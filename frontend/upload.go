package frontend

import (
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/bytestream"

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
	Recv() (*bytestream.WriteRequest, error)
}

// upload is the data of one Write stream as an io.Reader. It ends with io.EOF only after finish_write
// and exactly size bytes; a client that breaks a rule, leaves or stalls is an error, so the store
// never sees a short blob as a whole one. Its errors wrap errInvalid, errHalfClosed, errPresent,
// errStalled or are the stream's own. It is used by one goroutine.
type upload struct {
	stream   receiver
	name     string
	size     int64
	offset   int64  // bytes received
	data     []byte // received and not yet read
	finished bool
	err      error

	present   func() error // errPresent when the blob has appeared
	nextLook  int64        // offset at which to ask present again
	noData    time.Duration
	idleSince time.Time // when the run of messages without data began
}

// Read implements io.Reader.
func (u *upload) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(u.data) == 0 {
		if u.err == nil {
			u.err = u.next()
		}
		if u.err != nil {
			return 0, u.err
		}
	}
	n := copy(p, u.data)
	u.data = u.data[n:]
	return n, nil
}

// next receives one message.
func (u *upload) next() error {
	if u.finished {
		return io.EOF
	}
	if u.offset >= u.nextLook {
		u.nextLook = u.offset + presentEvery
		if err := u.present(); err != nil {
			return err
		}
	}
	m, err := u.stream.Recv()
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w after %d of %d bytes", errHalfClosed, u.offset, u.size)
	}
	if err != nil {
		return err
	}
	return u.accept(m)
}

// accept checks one message against what came before it and takes its data.
func (u *upload) accept(m *bytestream.WriteRequest) error {
	if name := m.GetResourceName(); name != "" && name != u.name {
		return fmt.Errorf("%w: resource_name changed from %s to %s", errInvalid, digest.Quote(u.name), digest.Quote(name))
	}
	if m.GetWriteOffset() != u.offset {
		return fmt.Errorf("%w: write_offset %d of %s, %d bytes were received", errInvalid, m.GetWriteOffset(), digest.Quote(u.name), u.offset)
	}
	if int64(len(m.GetData())) > u.size-u.offset {
		return fmt.Errorf("%w: %s has more data than the %d bytes of its digest", errInvalid, digest.Quote(u.name), u.size)
	}
	u.data = m.GetData()
	u.offset += int64(len(u.data))
	u.finished = m.GetFinishWrite()
	if u.finished && u.offset < u.size {
		return fmt.Errorf("%w: %s was finished after %d of %d bytes", errInvalid, digest.Quote(u.name), u.offset, u.size)
	}
	return u.progress()
}

// progress ends an upload that sends message after message without data (row X-32).
func (u *upload) progress() error {
	if len(u.data) > 0 || u.finished {
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
