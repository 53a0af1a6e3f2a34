package objectstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// pressed stores as much as a store takes until the test ends.
func pressed(t *testing.T, s *objectstore.Store) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var writing sync.WaitGroup
	writing.Go(func() {
		for ctx.Err() == nil {
			d, data := castest.Blob(castest.Space(t, ""), 100<<10)
			_ = s.Put(ctx, d, bytes.NewReader(data)) //nolint:errcheck // it is full again and again
		}
	})
	t.Cleanup(func() { cancel(); writing.Wait() })
}

// However a blob is reported present that is in an old generation, or in none any more, it stays for the
// retention from then on, while everything that fits comes in.
func TestEveryReportHoldsForTheRetention(t *testing.T) {
	t.Parallel()
	const budget, retention = 16 << 20, time.Second
	f := brokertest.Start(t)
	cfg := limited(t, f, budget)
	cfg.Retention = retention
	s := rotating(t, cfg)
	pressed(t, s)
	refused := func(err error) bool { return errors.Is(err, cas.ErrFull) || errors.Is(err, cas.ErrUnavailable) }
	// Uploads compete with those that press, and are refused again and again.
	stored := func(upload func() error) (bool, error) {
		for end := time.Now().Add(time.Minute); ; {
			if err := upload(); !refused(err) || time.Now().After(end) {
				return err == nil, err
			}
			time.Sleep(time.Millisecond) //nolint:forbidigo // a client that comes again
		}
	}
	reports := map[string]func(k kept) (bool, error){
		"Put": func(k kept) (bool, error) {
			return stored(func() error { return s.Put(t.Context(), k.digest, bytes.NewReader(k.data)) })
		},
		"PutFrom": func(k kept) (bool, error) {
			return stored(func() error { return s.PutFrom(t.Context(), k.digest, "upload", 0, bytes.NewReader(k.data)) })
		},
		"Missing": func(k kept) (bool, error) {
			missing, err := s.Missing(t.Context(), []digest.Digest{k.digest})
			return err == nil && len(missing) == 0, err
		},
		"Confirm": func(k kept) (bool, error) {
			missing, err := s.Confirm(t.Context(), []digest.Digest{k.digest})
			return err == nil && len(missing) == 0, err
		},
		"Committed": func(k kept) (bool, error) {
			n, err := s.Committed(t.Context(), k.digest, "upload")
			return err == nil && n == k.digest.Size(), err
		},
	}
	for name, report := range reports {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// A store that is full refuses some.
			held, end := 0, time.Now().Add(time.Minute)
			for i := 0; i < 2 || held == 0 && time.Now().Before(end); i++ {
				size := []int{1000, 600 << 10}[i%2]
				d, data := castest.Blob(castest.Space(t, ""), size)
				k := kept{d, data}
				eventually(t, "the blob is stored", func() bool { return s.Put(t.Context(), d, bytes.NewReader(data)) == nil })
				// Late enough for it to be old, or gone: reads would keep it.
				eventually(t, "the blob is old", func() bool { return s.GenerationOf(d) <= s.Old() })
				// And so late that it could only just stay for as long as it was old already.
				rest := time.NewTimer(retention)
				<-rest.C
				present, err := report(k)
				if !present {
					if err != nil && !refused(err) {
						t.Errorf("%d bytes: %v", size, err)
					}
					continue // then it may go
				}
				reported := time.Now()
				rest.Reset(retention)
				<-rest.C
				if g := s.GenerationOf(d); g == 0 {
					t.Errorf("%d bytes are gone after %v", size, time.Since(reported))
				}
				held++
			}
			if held == 0 {
				t.Error("nothing was ever reported present")
			}
		})
	}
}

// An upload that began in a generation which is dropped before it ends is not half stored: it is an error
// that clients repeat, or whole in a generation that lives.
func TestUploadOutlivesItsGeneration(t *testing.T) {
	t.Parallel()
	const budget = 32 << 20
	f := brokertest.Start(t)
	s := rotating(t, limited(t, f, budget))
	for _, size := range []int{300 << 10, 4 << 20} {
		d, data := castest.Blob(castest.Space(t, ""), size)
		began := make(chan struct{})
		goOn := make(chan struct{})
		rest := bytes.NewReader(data[size/2:])
		first := sync.OnceFunc(func() { close(began); <-goOn })
		source := io.MultiReader(bytes.NewReader(data[:size/2]), readerFunc(func(p []byte) (int, error) {
			first()
			return rest.Read(p)
		}))
		ended := make(chan error, 1)
		go func() { ended <- s.PutFrom(t.Context(), d, "upload", 0, source) }()
		<-began
		u, err := s.Usage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		now := u.Generations[len(u.Generations)-1].Number
		for range 2000 {
			if oldest(t, s) > now {
				break
			}
			put(t, s, 400<<10)
		}
		if oldest(t, s) <= now {
			t.Fatal("the generation is not dropped")
		}
		close(goOn)
		err = <-ended
		if err != nil && !errors.Is(err, cas.ErrUnavailable) {
			t.Errorf("PutFrom of %d bytes: error %v, want none or %v", size, err, cas.ErrUnavailable)
		}
		if absent := len(missing(t, s, d)) > 0; absent != (err != nil) {
			t.Errorf("PutFrom of %d bytes: error %v, and the blob is absent: %v", size, err, absent)
		}
		if n, e := s.Committed(t.Context(), d, "upload"); e != nil || err != nil && n != 0 {
			t.Errorf("Committed of %d bytes = %d, %v after %v", size, n, e, err)
		}
		if err := s.PutFrom(t.Context(), d, "upload", 0, bytes.NewReader(data)); err != nil {
			t.Errorf("PutFrom again: %v", err)
		}
		checkRead(t, s, kept{d, data})
	}
}
