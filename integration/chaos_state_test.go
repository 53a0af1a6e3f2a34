package integration_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/jetfarm/jetfarm/integration/history"
)

// spyName is what the connection of the tests is called among the broker's.
const spyName = "spy"

// A spy reads the farm's own state, past the farm's code: from its streams and the broker's lists.
type spy struct {
	nc *nats.Conn
	js jetstream.JetStream
}

// startSpy writes the states that the broker tells into a history, until the spy is closed.
func startSpy(t *testing.T, urls []string, h *history.History) *spy {
	t.Helper()
	nc, err := nats.Connect(strings.Join(urls, ","), nats.Name(spyName), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	_, err = nc.Subscribe("jetfarm.status.*", func(m *nats.Msg) {
		if len(m.Data) == 0 {
			return // somebody asks who watches
		}
		revision, err := strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
		var s history.State
		if err == nil {
			s, _, err = stateOf(m.Data, revision)
		}
		if err != nil {
			t.Errorf("state on %s: %v", m.Subject, err)
			return
		}
		h.Saw(s)
	})
	if err != nil {
		t.Fatal(err)
	}
	return &spy{nc: nc, js: js}
}

// stateOf reads a record as docs/PROTOCOL.md describes it.
func stateOf(data []byte, revision uint64) (history.State, *repb.Digest, error) {
	line, response, ok := bytes.Cut(data, []byte("\n"))
	if !ok {
		return history.State{}, nil, errors.New("no newline")
	}
	var r struct {
		Operation string
		Stage     repb.ExecutionStage_Value
		Attempt   int
		Action    struct {
			Hash string
			Size int64
		}
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return history.State{}, nil, err
	}
	return history.State{
		Operation: r.Operation, Revision: revision, Stage: r.Stage, Attempt: r.Attempt, Response: string(response),
	}, &repb.Digest{Hash: r.Action.Hash, SizeBytes: r.Action.Size}, nil
}

// messages returns the last message of each subject of a stream, in the order of their sequences.
func (s *spy) messages(ctx context.Context, stream, subject string) ([]*jetstream.RawStreamMsg, error) {
	from, err := s.js.Stream(ctx, stream)
	if err != nil {
		return nil, err
	}
	var all []*jetstream.RawStreamMsg
	for next := uint64(1); ; {
		m, err := from.GetMsg(ctx, next, jetstream.WithGetMsgSubject(subject))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		all, next = append(all, m), m.Sequence+1
	}
}

// left reads what there is when nobody wants anything.
func (s *spy) left(ctx context.Context, marker string) (history.Left, error) {
	var l history.Left
	for stream, n := range map[string]*int{"JOBS": &l.Jobs, "HELD": &l.Held, "FLIGHTS": &l.Flights} {
		from, err := s.js.Stream(ctx, stream)
		if err != nil {
			return l, fmt.Errorf("stream %s: %w", stream, err)
		}
		*n = int(from.CachedInfo().State.Msgs)
		if stream == "FLIGHTS" {
			continue
		}
		consumers := from.ListConsumers(ctx)
		for consumer := range consumers.Info() {
			l.Unacknowledged += consumer.NumAckPending
		}
		if err := consumers.Err(); err != nil {
			return l, fmt.Errorf("consumers of %s: %w", stream, err)
		}
	}
	letters, err := s.messages(ctx, "DEAD", "jetfarm.dead.*")
	if err != nil {
		return l, err
	}
	for _, m := range letters {
		line, _, _ := bytes.Cut(m.Data, []byte("\n"))
		l.Dead = append(l.Dead, string(line))
	}
	l.Processes, err = processesWith(marker)
	return l, err
}

// watchers returns the subscriptions to states that the brokers list, those of the tests left out.
func watchers(t testing.TB, f *chaosFarm) []string {
	t.Helper()
	var found []string
	for _, monitor := range f.monitors {
		var list struct {
			Connections []struct {
				Name          string
				Subscriptions []string `json:"subscriptions_list"`
			}
		}
		if err := json.Unmarshal([]byte(httpGet(t, monitor+"/connz?subs=1&limit=10000")), &list); err != nil {
			t.Fatal(err)
		}
		for _, c := range list.Connections {
			for _, subject := range c.Subscriptions {
				if c.Name != spyName && strings.HasPrefix(subject, "jetfarm.status.") {
					found = append(found, c.Name+": "+subject)
				}
			}
		}
	}
	return found
}

// processesWith returns the command lines of this machine that have a marker.
func processesWith(marker string) ([]string, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	var found []string
	for _, file := range files {
		// A process may be gone by the time its file is read.
		if line, err := os.ReadFile(file); err == nil && bytes.Contains(line, []byte(marker)) {
			found = append(found, string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
		}
	}
	return found, err
}

// awaitEnd waits until nothing is left, or for as long as even a farm that mends itself should not need,
// and puts what is left then into the history.
func (s *spy) awaitEnd(t *testing.T, f *chaosFarm, h *history.History, marker string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	began := time.Now()
	for ; ; pause(ctx, 500*time.Millisecond) {
		left, err := s.left(ctx, marker)
		if err == nil {
			left.Subscriptions = watchers(t, f)
			h.Left = left
			if left.Empty() {
				t.Logf("nothing is left %v after the load", time.Since(began).Round(time.Millisecond))
				return
			}
		}
		if ctx.Err() != nil {
			t.Errorf("something is left after %v (last error: %v)", time.Since(began).Round(time.Second), err)
			return
		}
	}
}

// collect reads the records, runs and blobs into a history.
func (s *spy) collect(t *testing.T, h *history.History, c *client, runs string) {
	t.Helper()
	ctx := t.Context()
	messages, err := s.messages(ctx, "OPERATIONS", "jetfarm.op.*")
	if err != nil {
		t.Fatal(err)
	}
	h.Records = make([]history.State, len(messages))
	actions := map[string]string{}
	var mu sync.Mutex // guards actions and h.Found
	var reads errgroup.Group
	reads.SetLimit(16)
	for i, m := range messages {
		reads.Go(func() error {
			state, action, err := stateOf(m.Data, m.Sequence)
			if err == nil {
				state.Action, err = c.nameOf(ctx, action, runs)
			}
			if err != nil {
				return fmt.Errorf("record on %s: %w", m.Subject, err)
			}
			h.Records[i] = state
			mu.Lock()
			defer mu.Unlock()
			actions[state.Operation] = state.Action
			return nil
		})
	}
	if err := reads.Wait(); err != nil {
		t.Fatal(err)
	}
	for i := range h.States {
		h.States[i].Action = actions[h.States[i].Operation]
	}
	ran, err := os.ReadFile(runs)
	if err != nil {
		t.Fatal(err)
	}
	h.Runs = map[string]int{}
	for name := range strings.FieldsSeq(string(ran)) {
		h.Runs[name]++
	}
	h.Found = map[string]string{}
	for _, d := range h.Wanted() {
		reads.Go(func() error {
			sum := sha256.New()
			size := &counter{}
			// A blob that is not there stays without an entry.
			if err := c.read(ctx, d, io.MultiWriter(sum, size)); err == nil {
				mu.Lock()
				defer mu.Unlock()
				h.Found[history.Text(d)] = fmt.Sprintf("%x/%d", sum.Sum(nil), size.n)
			}
			return nil
		})
	}
	if err := reads.Wait(); err != nil {
		t.Fatal(err)
	}
}

// nameOf returns the name that an action leaves when it runs.
func (c *client) nameOf(ctx context.Context, d *repb.Digest, runs string) (string, error) {
	action, command := new(repb.Action), new(repb.Command)
	data, err := c.get(ctx, d)
	if err == nil {
		err = proto.Unmarshal(data, action)
	}
	if err == nil {
		data, err = c.get(ctx, action.GetCommandDigest())
	}
	if err == nil {
		err = proto.Unmarshal(data, command)
	}
	if err != nil {
		return "", err
	}
	name := regexp.MustCompile(`echo (\w+) >> ` + regexp.QuoteMeta(runs)).FindStringSubmatch(strings.Join(command.GetArguments(), " "))
	if name == nil {
		return "", fmt.Errorf("command %q is of no test", slices.Clip(command.GetArguments()))
	}
	return name[1], nil
}

// A counter counts what is written.
type counter struct{ n int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.n += int64(len(b))
	return len(b), nil
}
