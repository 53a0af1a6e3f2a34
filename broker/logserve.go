package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// The output of an action is a file on its worker until the action has ended, and a blob after that.
// Nobody sends it anywhere while nobody reads it: a reader asks the worker for a part at an offset, one
// after the other, so an action costs nothing more and a slow reader holds nobody up. A question for
// what is not written yet waits at the worker for a moment.
//
// Rejected: publishing the output to subjects while it is written, which costs every action a watcher of
// its files, loses what is published before somebody subscribes, and floods readers that are slow.

// LogStream is one of the outputs of an action.
type LogStream string

// The outputs of an action.
const (
	Stdout LogStream = "stdout"
	Stderr LogStream = "stderr"
)

// LogReader reads what an operation that runs here has written so far, from offset on. The attempt is 0
// when it does not run here, or not yet.
type LogReader func(operation string, stream LogStream, offset int64, p []byte) (n, attempt int, err error)

const (
	// logPart is the most that one answer carries, small enough not to delay what else is on the connection.
	logPart = 64 << 10
	// logPatience is how long a question for what is not written yet waits at the worker.
	logPatience = time.Second
	// logTick is how often a worker looks whether questions that wait can be answered.
	logTick = 50 * time.Millisecond
	// maxLogQuestions bounds the questions that wait at a worker; what comes beyond is answered at once.
	maxLogQuestions = 1024

	attemptHeader = "Jetfarm-Attempt"
)

// logQuestion is the payload of a request on jetfarm.log.{worker}.
type logQuestion struct {
	Operation string    `json:"operation"`
	Stream    LogStream `json:"stream"`
	Offset    int64     `json:"offset"`
	// Wait keeps the answer back until there is something at the offset.
	Wait bool `json:"wait,omitempty"`

	until time.Time
	msg   *nats.Msg
}

// ServeLogs answers whoever reads the output of what this worker runs, until ctx ends.
func (q *Queue) ServeLogs(ctx context.Context, read LogReader) error {
	questions := make(chan *nats.Msg, maxLogQuestions)
	sub, err := q.c.nc.ChanSubscribe(logSubject+q.self.Name, questions)
	if err != nil {
		return unavailable(err)
	}
	defer sub.Unsubscribe() //nolint:errcheck // of a connection that is closed nothing is left
	s := &logServer{q: q, read: read, part: make([]byte, logPart)}
	ticker := time.NewTicker(logTick)
	defer ticker.Stop()
	for {
		tick := ticker.C
		if len(s.waiting) == 0 {
			ticker.Stop() // a worker that nobody asks does nothing
			tick = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case m := <-questions:
			if len(s.waiting) == 0 {
				ticker.Reset(logTick)
			}
			s.ask(ctx, m)
		case <-tick:
			s.look(ctx)
		}
	}
}

// logServer answers questions, one after the other.
type logServer struct {
	q       *Queue
	read    LogReader
	part    []byte
	waiting []*logQuestion
}

func (s *logServer) ask(ctx context.Context, m *nats.Msg) {
	question := &logQuestion{msg: m, until: time.Now().Add(logPatience)}
	if m.Reply == "" || json.Unmarshal(m.Data, question) != nil || question.Offset < 0 {
		return
	}
	if !s.answer(ctx, question, !question.Wait || len(s.waiting) >= maxLogQuestions) {
		s.waiting = append(s.waiting, question)
	}
}

// look answers the questions that can be answered, or have waited long enough.
func (s *logServer) look(ctx context.Context) {
	now := time.Now()
	left := s.waiting[:0]
	for _, question := range s.waiting {
		if !s.answer(ctx, question, now.After(question.until)) {
			left = append(left, question)
		}
	}
	clear(s.waiting[len(left):])
	s.waiting = left
}

// answer answers a question unless there is nothing at its offset and it is not due.
func (s *logServer) answer(ctx context.Context, question *logQuestion, due bool) bool {
	n, attempt, err := s.read(question.Operation, question.Stream, question.Offset, s.part)
	if err != nil {
		s.q.c.log.WarnContext(ctx, "read the output of an action", "operation", question.Operation, "err", err)
		attempt = 0
	}
	if n == 0 && attempt > 0 && !due {
		return false
	}
	reply := &nats.Msg{Subject: question.msg.Reply}
	if attempt > 0 {
		reply.Header = nats.Header{attemptHeader: []string{strconv.Itoa(attempt)}}
		reply.Data = s.part[:n]
	}
	if err := s.q.c.nc.PublishMsg(reply); err != nil {
		s.q.c.log.WarnContext(ctx, "send the output of an action", "operation", question.Operation, "err", err)
	}
	return true
}

// logRefs are the outputs of an operation whose response does not name them.
type logRefs struct {
	Stdout *blobRef `json:"stdout,omitempty"`
	Stderr *blobRef `json:"stderr,omitempty"`
}

// of returns a kept output, or the zero Digest.
func (r *logRefs) of(stream LogStream) (digest.Digest, error) {
	switch {
	case r == nil:
		return digest.Digest{}, nil
	case stream == Stderr:
		return r.Stderr.digest()
	}
	return r.Stdout.digest()
}

// KeepOutput notes where the output of a cancelled operation is, whose response cannot name it any more:
// the terminal state came first. It changes nothing else about the operation. It may be called after
// Guard has reported ErrCancelled, with blobs that are durable.
func (l *Lease) KeepOutput(ctx context.Context, stdout, stderr digest.Digest) error {
	ctx, cancel := detach(ctx, settleBound)
	defer cancel()
	_, _, err := l.q.c.update(ctx, l.record.Operation, func(r *record) error {
		if !r.cancelled() || r.Attempt != l.record.Attempt || r.Worker != l.q.self.Name || r.Logs != nil {
			return errUnchanged
		}
		r.Logs = &logRefs{Stdout: refOf(stdout), Stderr: refOf(stderr)}
		return nil
	})
	if errors.Is(err, errUnchanged) || errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("keep the output of operation %s: %w", l.record.Operation, err)
	}
	return nil
}

func (r *record) cancelled() bool {
	return r.done() && r.ResponseBlob == nil && statusOf(&Operation{Response: r.response}) == code.Code_CANCELLED
}
