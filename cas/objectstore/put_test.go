package objectstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
)

const (
	smallStream = "OBJ_cas-s-1-0"
	largeStream = "OBJ_cas-l-1-0"
)

var errStop = errors.New("the test ended this context")

// Audit row 3 and hazards H1, H2: the source has nothing more to give, the context ends, and the
// owner of the source ends the Read. Put returns at once and no byte stays.
func TestPutBlockedSourceLeavesNothing(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	s := running(t, config(t, f))
	for _, size := range []int{100 << 10, 20 << 20} {
		d, data := castest.Blob(castest.Space(t, ""), size)
		ctx, cancel := context.WithCancelCause(t.Context())
		var ended time.Time
		stalled := readerFunc(func([]byte) (int, error) {
			time.AfterFunc(20*time.Millisecond, func() { cancel(errStop) })
			<-ctx.Done()
			ended = time.Now()
			return 0, context.Cause(ctx)
		})
		err := s.Put(ctx, d, io.MultiReader(bytes.NewReader(data[:size/2]), stalled))
		if !errors.Is(err, errStop) {
			t.Errorf("Put: error %v, want %v", err, errStop)
		}
		if took := time.Since(ended); took > 4*time.Second { // less than any bound of the store
			t.Errorf("Put returned %v after its context", took)
		}
		wantNothing(t, nc, smallStream, largeStream)
	}
}

// A context that ends between two reads of a source that always has more.
func TestPutCancelledMidUploadLeavesNothing(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	s := running(t, config(t, f))
	d, data := castest.Blob(castest.Space(t, ""), 20<<20)
	for _, after := range []int{0, 1 << 20, 10 << 20, 20<<20 - 1, 20 << 20} {
		ctx, cancel := context.WithCancelCause(t.Context())
		read := 0
		source := bytes.NewReader(data)
		err := s.Put(ctx, d, readerFunc(func(p []byte) (int, error) {
			if read >= after {
				cancel(errStop)
			}
			n, err := source.Read(p[:min(len(p), 100_000)])
			read += n
			return n, err
		}))
		cancel(nil)
		if !errors.Is(err, errStop) {
			t.Errorf("Put cancelled after %d bytes: error %v, want %v", after, err, errStop)
		}
		wantNothing(t, nc, largeStream)
	}
}

func TestPutFailureLeavesNothing(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	s := running(t, config(t, f))
	for _, size := range []int{1, 512 << 10, 512<<10 + 1, 9 << 20} {
		d, data := castest.Blob(castest.Space(t, ""), size)
		wrong := bytes.Clone(data)
		wrong[size-1] ^= 1
		broken := errors.New("the source failed")
		for name, test := range map[string]struct {
			source io.Reader
			want   error
		}{
			"wrong hash":   {bytes.NewReader(wrong), cas.ErrMismatch},
			"short":        {bytes.NewReader(data[:size-1]), cas.ErrMismatch},
			"long":         {io.MultiReader(bytes.NewReader(data), strings.NewReader("x")), cas.ErrMismatch},
			"source fails": {io.MultiReader(bytes.NewReader(data[:size-1]), iotest.ErrReader(broken)), broken},
			"no progress":  {readerFunc(func([]byte) (int, error) { return 0, nil }), io.ErrNoProgress},
		} {
			if err := s.Put(t.Context(), d, test.source); !errors.Is(err, test.want) {
				t.Errorf("Put of %d bytes, %s: error %v, want %v", size, name, err, test.want)
			}
			wantNothing(t, nc, smallStream, largeStream)
		}
	}
}

// Audit row 18 and hazards H4, H5: eight writers, each a process of its own that knows nothing of
// the others, leave one copy, and no reader ever fails.
func TestEqualPutsLeaveOneCopy(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	for _, test := range []struct {
		size     int
		stream   string
		messages uint64
	}{{1 << 10, smallStream, 2}, {512 << 10, smallStream, 2}, {8 << 20, largeStream, 17}} {
		stores := make([]cas.Store, 8)
		for i := range stores {
			stores[i] = open(t, config(t, f))
		}
		before := streamState(t, nc, test.stream).Msgs
		d, data := castest.Blob(castest.Space(t, ""), test.size)
		var writers sync.WaitGroup
		for _, s := range stores {
			writers.Go(func() {
				if err := s.Put(t.Context(), d, iotest.HalfReader(bytes.NewReader(data))); err != nil {
					t.Errorf("Put: %v", err)
				}
				for range 3 {
					if got, err := cas.ReadAll(t.Context(), s, d, d.Size()); err != nil || !bytes.Equal(got, data) {
						t.Errorf("read after Put: %d bytes, error %v", len(got), err)
					}
				}
			})
		}
		writers.Wait()
		if got := streamState(t, nc, test.stream).Msgs - before; got != test.messages {
			t.Errorf("%d bytes put 8 times are %d messages, want %d", test.size, got, test.messages)
		}
	}
}

// The object was deleted by a stock client, which leaves its mark under the metadata subject.
func TestPutReplacesDeletedObject(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, config(t, f))
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	for bucket, size := range map[string]int{"cas-s-1-0": 1 << 10, "cas-l-1-0": 2 << 20} {
		d, data := castest.Blob(castest.Space(t, ""), size)
		if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		stock, err := js.ObjectStore(t.Context(), bucket)
		if err != nil {
			t.Fatal(err)
		}
		if err := stock.Delete(t.Context(), d.String()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Open(t.Context(), d, 0); !errors.Is(err, cas.ErrNotFound) {
			t.Errorf("Open of a deleted object: error %v, want %v", err, cas.ErrNotFound)
		}
		if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
			t.Errorf("Put after deletion: %v", err)
		}
		if got, err := cas.ReadAll(t.Context(), s, d, d.Size()); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, error %v", len(got), err)
		}
	}
}

func TestPutIntoFullStore(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	cfg := config(t, f)
	cfg.MaxBytes = 4 << 20
	s := open(t, cfg)
	for _, size := range []int{300 << 10, 3 << 20} {
		var err error
		stored := 0
		for err == nil && stored < 100 {
			d, data := castest.Blob(castest.Space(t, ""), size)
			if err = s.Put(t.Context(), d, bytes.NewReader(data)); err == nil {
				stored++
				continue
			}
			if _, err := s.Open(t.Context(), d, 0); !errors.Is(err, cas.ErrNotFound) {
				t.Errorf("Open of what did not fit: error %v, want %v", err, cas.ErrNotFound)
			}
		}
		if !errors.Is(err, cas.ErrFull) || stored == 0 {
			t.Errorf("after %d blobs of %d bytes: error %v, want %v", stored, size, err, cas.ErrFull)
		}
	}
	if got := streamState(t, nc, smallStream).Msgs; got%2 != 0 {
		t.Errorf("%d messages of small blobs, want pairs of chunk and metadata", got)
	}
	if got := streamState(t, nc, largeStream).Msgs; got != 7 {
		t.Errorf("%d messages of large blobs, want the 7 of the one that fits", got)
	}
}

// More bytes at the same time than the broker lets wait for one stream.
func TestManyLargePutsKeepTheBudget(t *testing.T) {
	f := brokertest.Start(t)
	cfg := config(t, f)
	cfg.WriteBudget = 2 << 20
	s := open(t, cfg)
	var writers sync.WaitGroup
	for range 24 {
		writers.Go(func() {
			d, data := castest.Blob(castest.Space(t, ""), 4<<20+17)
			if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
				t.Errorf("Put: %v", err)
			}
			if got, err := cas.ReadAll(t.Context(), s, d, d.Size()); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, error %v", len(got), err)
			}
		})
	}
	writers.Wait()
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// rawMessage is a stored message to be published again.
func rawMessage(m *jetstream.RawStreamMsg) *nats.Msg {
	h := maps.Clone(m.Header)
	delete(h, jetstream.ExpectedLastSubjSeqHeader)
	return &nats.Msg{Subject: m.Subject, Header: h, Data: m.Data}
}
