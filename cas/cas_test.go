package cas_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
)

func TestVerify(t *testing.T) {
	broken := errors.New("the source failed")
	for _, size := range []int{0, 1, 1000, 100_000} {
		d, data := castest.Blob(castest.Space(t, ""), size)
		other := append(bytes.Clone(data), 1)
		flipped := bytes.Clone(other)[:size]
		for i := range flipped {
			flipped[i] ^= 1
		}
		for name, test := range map[string]struct {
			source io.Reader
			want   error
		}{
			"right":    {bytes.NewReader(data), nil},
			"one byte": {iotest.OneByteReader(bytes.NewReader(data)), nil},
			"timely":   {iotest.DataErrReader(bytes.NewReader(data)), nil},
			"long":     {bytes.NewReader(other), cas.ErrMismatch},
			"longer":   {io.MultiReader(bytes.NewReader(other), iotest.ErrReader(broken)), cas.ErrMismatch},
			"fails":    {io.MultiReader(bytes.NewReader(data), iotest.ErrReader(broken)), broken},
		} {
			got, err := io.ReadAll(cas.Verify(test.source, d))
			if !errors.Is(err, test.want) {
				t.Errorf("%s of %d bytes: error %v, want %v", name, size, err, test.want)
			}
			if test.want == nil && !bytes.Equal(got, data) {
				t.Errorf("%s of %d bytes: %d wrong bytes", name, size, len(got))
			}
		}
		if size == 0 {
			continue
		}
		for name, bad := range map[string][]byte{"short": data[:size-1], "wrong": flipped, "empty": nil} {
			for range 2 {
				if _, err := io.ReadAll(cas.Verify(bytes.NewReader(bad), d)); !errors.Is(err, cas.ErrMismatch) {
					t.Errorf("%s of %d bytes: error %v, want ErrMismatch", name, size, err)
				}
			}
		}
	}
}

// TestVerifyReadsOneByteMore: a reader that is too long is not read on.
func TestVerifyReadsOneByteMore(t *testing.T) {
	d := castest.Space(t, "").Of([]byte("hello"))
	source := strings.NewReader("hello and more")
	r := cas.VerifyCloser(io.NopCloser(source), d)
	if _, err := io.ReadAll(r); !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("error %v, want ErrMismatch", err)
	}
	if n := len("hello and more") - source.Len(); n > 6 {
		t.Errorf("%d bytes were read of a blob of 5", n)
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("after the verdict: %d bytes, error %v", n, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

func TestVerifier(t *testing.T) {
	d := castest.Space(t, "").Of([]byte("hello"))
	v := cas.NewVerifier(d)
	for _, part := range []string{"he", "", "llo"} {
		if err := v.Verdict(); !errors.Is(err, cas.ErrMismatch) {
			t.Errorf("after %d bytes: error %v", v.Size(), err)
		}
		if _, err := io.WriteString(v, part); err != nil {
			t.Error(err)
		}
	}
	if err := v.Verdict(); err != nil || v.Size() != 5 || v.Digest() != d {
		t.Errorf("the whole blob: error %v", err)
	}
	if _, err := io.WriteString(v, "!"); !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("a byte too many: error %v", err)
	}
	if err := v.Verdict(); !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("after a byte too many: error %v", err)
	}
}

// TestReadAllDoesNotTrust: a store that breaks its contract does not make ReadAll return bytes, nor
// an end of file that a caller could take for its own.
func TestReadAllDoesNotTrust(t *testing.T) {
	d, data := castest.Blob(castest.Space(t, ""), 1000)
	late := errors.New("the verdict")
	for name, test := range map[string]struct {
		source io.Reader
		want   error
	}{
		"empty":        {strings.NewReader(""), cas.ErrMismatch},
		"short":        {bytes.NewReader(data[:999]), cas.ErrMismatch},
		"long":         {bytes.NewReader(append(bytes.Clone(data), 0)), cas.ErrMismatch},
		"late verdict": {io.MultiReader(bytes.NewReader(data), iotest.ErrReader(late)), late},
		"empty reads":  {&pausing{r: io.MultiReader(bytes.NewReader(data), iotest.ErrReader(late))}, late},
	} {
		got, err := cas.ReadAll(t.Context(), opener{test.source}, d, 1000)
		if !errors.Is(err, test.want) || errors.Is(err, io.EOF) || got != nil {
			t.Errorf("%s: %d bytes, error %v, want %v", name, len(got), err, test.want)
		}
	}
	got, err := cas.ReadAll(t.Context(), opener{&pausing{r: bytes.NewReader(data)}}, d, 1000)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("a right blob: %d bytes, error %v", len(got), err)
	}
}

type opener struct{ source io.Reader }

func (o opener) Open(context.Context, digest.Digest, int64) (io.ReadCloser, error) {
	return io.NopCloser(o.source), nil
}

func (opener) Put(context.Context, digest.Digest, io.Reader) error { return nil }

func (opener) Missing(context.Context, []digest.Digest) ([]digest.Digest, error) { return nil, nil }

// pausing returns no bytes and no error every other time.
type pausing struct {
	r    io.Reader
	read bool
}

func (p *pausing) Read(b []byte) (int, error) {
	if p.read = !p.read; p.read {
		return 0, nil
	}
	return p.r.Read(b)
}
