package objectstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

const chunk = 512 << 10

var errBroken = errors.New("the client's stream broke")

// broken is the first n bytes and then errBroken.
func broken(data []byte) io.Reader {
	return io.MultiReader(bytes.NewReader(data), iotest.ErrReader(errBroken))
}

// breakOff stores the first n bytes under the name, from offset on.
func breakOff(t testing.TB, s *objectstore.Store, d digest.Digest, name string, offset int64, data []byte) {
	t.Helper()
	if err := s.PutFrom(t.Context(), d, name, offset, broken(data)); !errors.Is(err, errBroken) {
		t.Fatalf("PutFrom(%d) of an upload that breaks: error %v, want %v", offset, err, errBroken)
	}
}

func wantCommitted(t testing.TB, s *objectstore.Store, d digest.Digest, name string, want int64) {
	t.Helper()
	if got, err := s.Committed(t.Context(), d, name); err != nil || got != want {
		t.Errorf("Committed %d, error %v, want %d", got, err, want)
	}
}

func wantBlob(t testing.TB, s cas.Store, d digest.Digest, data []byte) {
	t.Helper()
	if got, err := cas.ReadAll(t.Context(), s, d, d.Size()); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, error %v", len(got), err)
	}
}

// What is kept of an upload is known to every process, and each can go on at every offset within it.
func TestResumeInAnotherProcess(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	for _, offset := range []int64{1, chunk - 1, chunk, chunk + 1, 3*chunk - 1, 3 * chunk} {
		d, data := castest.Blob(castest.Space(t, "resume"), 5*chunk+17)
		first, second := open(t, config(t, f)), open(t, config(t, f))
		before := streamState(t, nc, largeStream).Msgs
		breakOff(t, first, d, "upload", 0, data[:3*chunk+100])
		wantCommitted(t, second, d, "upload", 3*chunk)
		wantCommitted(t, second, d, "another", 0)
		if len(missing(t, second, d)) != 1 {
			t.Error("a blob of which a part is kept is present")
		}
		if err := second.PutFrom(t.Context(), d, "upload", offset, bytes.NewReader(data[offset:])); err != nil {
			t.Fatalf("PutFrom(%d): %v", offset, err)
		}
		wantBlob(t, first, d, data)
		wantCommitted(t, second, d, "upload", d.Size())
		if got := streamState(t, nc, largeStream).Msgs - before; got != 7 {
			t.Errorf("%d messages are left, want 6 chunks and metadata", got)
		}
	}
}

// An upload may break off again and again, and start over.
func TestResumeAgain(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, config(t, f))
	d, data := castest.Blob(castest.Space(t, "resume"), 12*chunk)
	wantCommitted(t, s, d, "upload", 0)
	at := int64(0)
	for range 5 {
		breakOff(t, s, d, "upload", at, data[at:at+2*chunk+5])
		at += 2 * chunk
		wantCommitted(t, s, d, "upload", at)
	}
	breakOff(t, s, d, "upload", 0, data[:chunk]) // starts over; what is kept never shrinks
	wantCommitted(t, s, d, "upload", at)
	state := streamState(t, f.Connect(t), largeStream)
	if state.Msgs > 3*10 {
		t.Errorf("%d chunks are kept of 10 that were sent", state.Msgs)
	}
	if err := s.PutFrom(t.Context(), d, "upload", at, bytes.NewReader(data[at:])); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, d, data)
	if state := streamState(t, f.Connect(t), largeStream); state.Msgs != 13 {
		t.Errorf("%d messages are left, want 12 chunks and metadata", state.Msgs)
	}
}

// The whole blob was sent, and the process died before it stored the metadata.
func TestResumeAtTheEnd(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, config(t, f))
	d, data := castest.Blob(castest.Space(t, "resume"), 2*chunk+5)
	if err := s.PutFrom(t.Context(), d, "upload", 0, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	rewrite(t, f, largeStream, "$O.cas-l-1-0.M.>", func([][]byte) [][]byte { return nil })
	other := open(t, config(t, f))
	wantCommitted(t, other, d, "upload", d.Size())
	if err := other.PutFrom(t.Context(), d, "upload", d.Size(), bytes.NewReader(nil)); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, other, d, data)
}

func TestResumeRefused(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, config(t, f))
	space := castest.Space(t, "resume")
	d, data := castest.Blob(space, 4*chunk)
	breakOff(t, s, d, "upload", 0, data[:2*chunk+1])
	little, littleData := castest.Blob(space, 1000)
	breakOff(t, s, little, "upload", 0, littleData[:500])
	wantCommitted(t, s, little, "upload", 0) // less than a chunk is not kept
	for _, test := range []struct {
		d      digest.Digest
		upload string
		offset int64
	}{
		{d, "upload", 2*chunk + 1},
		{d, "upload", 4 * chunk},
		{d, "upload", 4*chunk + 1},
		{d, "upload", -1},
		{d, "another", 1},
		{d, "", 1},
		{little, "upload", 1},
		{little, "upload", 500},
	} {
		unread := readerFunc(func([]byte) (int, error) {
			t.Error("the source was read")
			return 0, io.EOF
		})
		if err := s.PutFrom(t.Context(), test.d, test.upload, test.offset, unread); !errors.Is(err, cas.ErrNotKept) {
			t.Errorf("PutFrom(%q, %d): error %v, want %v", test.upload, test.offset, err, cas.ErrNotKept)
		}
	}
	wantCommitted(t, s, d, "upload", 2*chunk)
}

// The beginning that is kept has other bytes than the blob.
func TestResumeOfWrongBytes(t *testing.T) {
	f := brokertest.Start(t)
	nc := f.Connect(t)
	s := open(t, config(t, f))
	d, data := castest.Blob(castest.Space(t, "resume"), 4*chunk)
	wrong := bytes.Clone(data)
	wrong[5] ^= 1
	breakOff(t, s, d, "upload", 0, wrong[:chunk+1])
	breakOff(t, s, d, "upload", chunk, wrong[chunk:2*chunk])
	if err := s.PutFrom(t.Context(), d, "upload", 2*chunk, bytes.NewReader(data[2*chunk:])); !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("PutFrom: error %v, want %v", err, cas.ErrMismatch)
	}
	wantCommitted(t, s, d, "upload", 0)
	wantNothing(t, nc, largeStream)
	if err := s.PutFrom(t.Context(), d, "upload", 0, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, d, data)
}

// Chunks of the part that is kept are lost, swapped or damaged in the stream.
func TestResumeOfDamagedPart(t *testing.T) {
	for name, change := range map[string]func([]*jetstream.RawStreamMsg) []*jetstream.RawStreamMsg{
		"lost":    func(ms []*jetstream.RawStreamMsg) []*jetstream.RawStreamMsg { return append(ms[:1:1], ms[2:]...) },
		"swapped": func(ms []*jetstream.RawStreamMsg) []*jetstream.RawStreamMsg { ms[1], ms[2] = ms[2], ms[1]; return ms },
		"damaged": func(ms []*jetstream.RawStreamMsg) []*jetstream.RawStreamMsg { ms[1].Data[9] ^= 1; return ms },
		"short":   func(ms []*jetstream.RawStreamMsg) []*jetstream.RawStreamMsg { ms[2].Data = ms[2].Data[1:]; return ms },
	} {
		t.Run(name, func(t *testing.T) {
			f := brokertest.Start(t)
			s := open(t, config(t, f))
			d, data := castest.Blob(castest.Space(t, "resume"), 6*chunk)
			breakOff(t, s, d, "upload", 0, data[:4*chunk])
			republish(t, f, largeStream, change)
			kept, err := s.Committed(t.Context(), d, "upload")
			if err != nil || kept < 3*chunk {
				t.Fatalf("Committed %d, error %v", kept, err)
			}
			unread := readerFunc(func([]byte) (int, error) {
				t.Error("the source was read")
				return 0, io.EOF
			})
			if err := s.PutFrom(t.Context(), d, "upload", kept, unread); !errors.Is(err, cas.ErrNotKept) {
				t.Errorf("PutFrom: error %v, want %v", err, cas.ErrNotKept)
			}
			again, err := s.Committed(t.Context(), d, "upload")
			if err != nil || again >= kept {
				t.Fatalf("Committed %d, error %v, want less than %d", again, err, kept)
			}
			if err := s.PutFrom(t.Context(), d, "upload", again, bytes.NewReader(data[again:])); err != nil {
				t.Fatal(err)
			}
			wantBlob(t, s, d, data)
		})
	}
}

// republish replaces the messages of a stream by what change makes of them.
func republish(t *testing.T, f *brokertest.Farm, stream string, change func([]*jetstream.RawStreamMsg) []*jetstream.RawStreamMsg) {
	t.Helper()
	js, err := jetstream.New(f.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	all := f.All(t, stream)
	f.Purge(t, stream)
	for _, m := range change(all) {
		if _, err := js.PublishMsg(t.Context(), rawMessage(m)); err != nil {
			t.Fatal(err)
		}
	}
}

// Many clients use one name at the same time, some of which go on and some of which break off. The
// bytes of two never mix, and what is stored is whole.
func TestResumeRaces(t *testing.T) {
	f := brokertest.Start(t)
	first := open(t, config(t, f))
	for round := range 4 {
		d, data := castest.Blob(castest.Space(t, fmt.Sprint("race", round)), 9*chunk+1)
		breakOff(t, first, d, "upload", 0, data[:4*chunk])
		var clients sync.WaitGroup
		for i := range 6 {
			s := open(t, config(t, f))
			clients.Go(func() {
				offset := int64(i%3) * 2 * chunk
				r := iotest.HalfReader(bytes.NewReader(data[offset:]))
				if i == 5 {
					r = broken(data[offset : offset+3*chunk])
				}
				err := s.PutFrom(t.Context(), d, "upload", offset, r)
				switch {
				case err == nil, i == 5 && errors.Is(err, errBroken):
				case errors.Is(err, cas.ErrUnavailable), errors.Is(err, cas.ErrNotKept):
					t.Logf("client %d at %d gave up: %v", i, offset, err)
				default:
					t.Errorf("client %d at %d: %v", i, offset, err)
				}
			})
		}
		clients.Wait()
		fresh := open(t, config(t, f))
		if len(missing(t, fresh, d)) != 0 {
			t.Errorf("round %d: nobody stored the blob", round)
			continue
		}
		wantBlob(t, fresh, d, data)
		wantCommitted(t, fresh, d, "upload", d.Size())
	}
}

// An upload that was stopped does not become a blob, and says so, whether it lacked one chunk or several.
func TestStoppedUploadFails(t *testing.T) {
	f := brokertest.Start(t)
	s := open(t, config(t, f))
	for _, sent := range []int64{5 * chunk, 2 * chunk} {
		d, data := castest.Blob(castest.Space(t, "stop"), 6*chunk)
		err := s.PutFrom(t.Context(), d, "upload", 0, io.MultiReader(bytes.NewReader(data[:sent]), readerFunc(func([]byte) (int, error) {
			// Meanwhile another client of the same name brings other bytes, on the same beginning.
			other := open(t, config(t, f))
			eventually(t, "all chunks so far are stored", func() bool {
				n, err := other.Committed(t.Context(), d, "upload")
				return err == nil && n == sent
			})
			if err := other.PutFrom(t.Context(), d, "upload", sent, bytes.NewReader(make([]byte, 6*chunk-sent))); !errors.Is(err, cas.ErrMismatch) {
				t.Errorf("PutFrom of other bytes: error %v, want %v", err, cas.ErrMismatch)
			}
			return 0, io.EOF
		}), bytes.NewReader(data[sent:])))
		_, read := open(t, config(t, f)).Open(t.Context(), d, 0)
		if !errors.Is(err, cas.ErrUnavailable) || !errors.Is(read, cas.ErrNotFound) {
			t.Errorf("PutFrom of an upload that was stopped after %d bytes: error %v, then Open %v", sent, err, read)
		}
		wantNothing(t, f.Connect(t), largeStream)
	}
}

// A canceled upload with a name keeps what it brought, holds no budget and goes on later.
func TestCanceledUploadIsKept(t *testing.T) {
	f := brokertest.Start(t)
	cfg := config(t, f)
	cfg.WriteBudget = 2 * chunk
	s := open(t, cfg)
	d, data := castest.Blob(castest.Space(t, "cancel"), 8*chunk)
	at := int64(0)
	for _, more := range []int64{3, 2, 2} {
		ctx, cancel := context.WithCancelCause(t.Context())
		err := s.PutFrom(ctx, d, "upload", at, io.MultiReader(bytes.NewReader(data[at:at+more*chunk]), readerFunc(func([]byte) (int, error) {
			cancel(errStop)
			return 0, nil
		})))
		cancel(nil)
		if !errors.Is(err, errStop) {
			t.Errorf("PutFrom: error %v, want %v", err, errStop)
		}
		at += more * chunk
		wantCommitted(t, s, d, "upload", at)
	}
	if err := s.PutFrom(t.Context(), d, "upload", at, bytes.NewReader(data[at:])); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, d, data)
}
