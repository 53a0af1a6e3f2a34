package objectstore

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas"
)

// api makes single requests to JetStream over one connection, each bounded by timeout. Errors are
// those of brokerError.
type api struct {
	conn    *nats.Conn
	timeout time.Duration
}

// stored is one message of a stream.
type stored struct {
	sequence uint64
	header   nats.Header
	data     []byte
	time     time.Time // when it was stored; only known from the leader
}

// last returns the last message of the subject from any replica. With replicas, cas.ErrNotFound may
// be wrong for a message that was just stored.
func (a api) last(ctx context.Context, stream, subject string) (stored, error) {
	m, err := a.ask(ctx, "$JS.API.DIRECT.GET."+stream+"."+subject, nil)
	if err != nil {
		return stored{}, err
	}
	if status := header(m, "Status"); status != "" {
		return stored{}, directError(status, m)
	}
	sequence, err := strconv.ParseUint(header(m, jetstream.SequenceHeader), 10, 64)
	if err != nil {
		return stored{}, fmt.Errorf("%w: a direct get answered without a sequence", cas.ErrUnavailable)
	}
	return stored{sequence: sequence, header: m.Header, data: m.Data}, nil
}

// directError is the error of a status that answers a direct get in place of a message.
func directError(status string, m *nats.Msg) error {
	if status == strconv.Itoa(http.StatusNotFound) {
		return cas.ErrNotFound
	}
	return fmt.Errorf("%w: direct get: %s %s", cas.ErrUnavailable, status, header(m, "Description"))
}

// header reads a field that the broker writes in exactly this case.
func header(m *nats.Msg, name string) string {
	if v := m.Header[name]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// lastFromLeader is last without its doubt.
func (a api) lastFromLeader(ctx context.Context, stream, subject string) (stored, error) {
	return a.fromLeader(ctx, stream, map[string]any{"last_by_subj": subject})
}

// nextFromLeader returns the first message of the subject at or after sequence.
func (a api) nextFromLeader(ctx context.Context, stream, subject string, sequence uint64) (stored, error) {
	return a.fromLeader(ctx, stream, map[string]any{"next_by_subj": subject, "seq": sequence})
}

func (a api) fromLeader(ctx context.Context, stream string, request map[string]any) (stored, error) {
	var answer struct {
		refusal
		Message struct {
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	if err := a.call(ctx, "STREAM.MSG.GET."+stream, request, &answer); err != nil {
		return stored{}, err
	}
	m := stored{sequence: answer.Message.Sequence, data: answer.Message.Data, time: answer.Message.Time}
	if len(answer.Message.Header) > 0 {
		var err error
		if m.header, err = nats.DecodeHeadersMsg(answer.Message.Header); err != nil {
			return stored{}, fmt.Errorf("%w: message %d of %s: %w", cas.ErrUnavailable, m.sequence, stream, err)
		}
	}
	return m, nil
}

// subjects calls f with every subject of the stream that matches the filter.
func (a api) subjects(ctx context.Context, stream, filter string, f func(subject string)) error {
	return a.counts(ctx, stream, filter, func(subject string, _ uint64) { f(subject) })
}

// counts is subjects with the number of messages of each.
func (a api) counts(ctx context.Context, stream, filter string, f func(subject string, messages uint64)) error {
	for offset := 0; ; {
		var answer struct {
			refusal
			Total int `json:"total"`
			State struct {
				Subjects map[string]uint64 `json:"subjects"`
			} `json:"state"`
		}
		request := map[string]any{"subjects_filter": filter, "offset": offset}
		if err := a.call(ctx, "STREAM.INFO."+stream, request, &answer); err != nil {
			return err
		}
		for subject, messages := range answer.State.Subjects {
			f(subject, messages)
		}
		offset += len(answer.State.Subjects)
		if offset >= answer.Total || len(answer.State.Subjects) == 0 {
			return nil
		}
	}
}

// delete removes one message.
func (a api) delete(ctx context.Context, stream string, sequence uint64) error {
	return a.call(ctx, "STREAM.MSG.DELETE."+stream, map[string]any{"seq": sequence, "no_erase": true}, new(refusal))
}

// purge removes all messages of the subject.
func (a api) purge(ctx context.Context, stream, subject string) error {
	return a.call(ctx, "STREAM.PURGE."+stream, map[string]any{"filter": subject}, new(refusal))
}

// refusal is the part of an answer that says why the broker did not do what was asked.
type refusal struct {
	Error *jetstream.APIError `json:"error"`
}

func (r *refusal) refused() *jetstream.APIError { return r.Error }

// call makes a request of the JetStream API and decodes its answer.
func (a api) call(ctx context.Context, method string, request map[string]any, answer interface{ refused() *jetstream.APIError }) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	m, err := a.ask(ctx, "$JS.API."+method, body)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(m.Data, answer); err != nil {
		return fmt.Errorf("%w: %s answered %w", cas.ErrUnavailable, method, err)
	}
	if refused := answer.refused(); refused != nil {
		return apiError(refused)
	}
	return nil
}

func (a api) ask(ctx context.Context, subject string, body []byte) (*nats.Msg, error) {
	if ctx.Err() != nil {
		return nil, ended(ctx)
	}
	bounded, cancel := context.WithTimeoutCause(ctx, a.timeout, errTimeout)
	defer cancel()
	m, err := a.conn.RequestWithContext(bounded, subject, body)
	return m, brokerError(ctx, err)
}
