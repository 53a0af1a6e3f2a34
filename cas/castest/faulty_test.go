package castest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func TestFaults(t *testing.T) {
	fail, stop := errors.New("the planned failure"), errors.New("the test ended this context")
	d, data := castest.Blob(castest.Space(t, ""), 1000)
	for name, test := range map[string]struct {
		fault    castest.Fault
		passed   int   // bytes that are right, of a read
		read     error // how a read ends
		put      error
		stored   bool
		missing  error
		pretends bool // Missing finds nothing
	}{
		"none":           {castest.Fault{}, 1000, nil, nil, true, nil, false},
		"call fails":     {castest.Fault{After: -1, Err: fail}, 0, fail, fail, false, fail, false},
		"fails midway":   {castest.Fault{After: 300, Err: fail}, 300, fail, fail, false, fail, false},
		"call stalls":    {castest.Fault{After: -1, Stall: true}, 0, stop, stop, false, stop, false},
		"stalls midway":  {castest.Fault{After: 300, Stall: true}, 300, stop, stop, false, stop, false},
		"truncates":      {castest.Fault{After: 300, Truncate: true}, 300, nil, nil, false, nil, false},
		"lies":           {castest.Fault{After: 300, Lie: true}, 300, nil, nil, false, nil, true},
		"lies about one": {castest.Fault{Lie: true}, 0, nil, nil, false, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			brief := func() context.Context {
				ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, stop)
				t.Cleanup(cancel)
				return ctx
			}
			memory := castest.NewMemory()
			s := &castest.Faulty{Store: memory, Plan: func(castest.Op, digest.Digest) castest.Fault { return test.fault }}

			if err := s.Put(brief(), d, bytes.NewReader(data)); !errors.Is(err, test.put) {
				t.Errorf("Put: error %v, want %v", err, test.put)
			}
			if missing, err := memory.Missing(t.Context(), []digest.Digest{d}); err != nil || (len(missing) == 0) != test.stored {
				t.Errorf("after Put missing is %v, error %v", missing, err)
			}
			missing, err := s.Missing(brief(), []digest.Digest{d})
			if !errors.Is(err, test.missing) {
				t.Errorf("Missing: error %v, want %v", err, test.missing)
			}
			if test.pretends && len(missing) > 0 {
				t.Errorf("Missing: %v, which is the truth", missing)
			}

			memory.Corrupt(d, data)
			got, err := read(brief(), s, d)
			if !errors.Is(err, test.read) {
				t.Errorf("reading: error %v, want %v", err, test.read)
			}
			right := 0
			for right < len(got) && got[right] == data[right] {
				right++
			}
			if right != test.passed {
				t.Errorf("%d bytes are right, want %d", right, test.passed)
			}
		})
	}
}

func read(ctx context.Context, s cas.Store, d digest.Digest) ([]byte, error) {
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}
