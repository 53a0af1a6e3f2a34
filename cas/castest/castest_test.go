package castest_test

import (
	"bytes"
	"context"
	"io"
	"testing"

	"go.uber.org/goleak"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemory(t *testing.T) {
	castest.Run(t, func(testing.TB) cas.Store { return castest.NewMemory() })
}

func TestFaultyWithoutFaults(t *testing.T) {
	castest.Run(t, func(testing.TB) cas.Store { return &castest.Faulty{Store: castest.NewMemory()} })
}

func TestResumable(t *testing.T) {
	castest.Run(t, func(testing.TB) cas.Store { return castest.NewResumable() })
	castest.RunResumer(t, func(testing.TB) cas.Store { return castest.NewResumable() })
}

func TestFrames(t *testing.T) {
	castest.RunFrames(t, func(testing.TB) cas.Store { return castest.NewMemory() })
	castest.RunFrames(t, func(testing.TB) cas.Store { return opener{castest.NewMemory()} })
}

// opener is a cas.FrameOpener that makes one frame of a whole blob.
type opener struct{ *castest.Memory }

func (o opener) OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := o.Open(ctx, d, offset)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(bytes.NewReader(compress.Append(nil, data))), r.Close()
}
