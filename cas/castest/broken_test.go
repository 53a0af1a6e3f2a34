package castest_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/compress"
	"github.com/jetfarm/jetfarm/cas/digest"
)

// broken are stores with one fault each, under the name of the part of the suite that finds it.
var broken = map[string]func(*castest.Memory) cas.Store{
	"Offsets": func(m *castest.Memory) cas.Store {
		return store{Memory: m, open: func(ctx context.Context, d digest.Digest, _ int64) (io.ReadCloser, error) { return m.Open(ctx, d, 0) }}
	},
	"Absent": func(m *castest.Memory) cas.Store {
		return store{Memory: m, open: func(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
			r, err := m.Open(ctx, d, offset)
			if errors.Is(err, cas.ErrNotFound) {
				return io.NopCloser(strings.NewReader("")), nil
			}
			return r, err
		}}
	},
	"Mismatch": func(m *castest.Memory) cas.Store {
		return store{Memory: m, put: func(_ context.Context, d digest.Digest, r io.Reader) error {
			data, err := io.ReadAll(r)
			m.Corrupt(d, data)
			return err
		}}
	},
	"EndlessSource": func(m *castest.Memory) cas.Store {
		return store{Memory: m, put: func(ctx context.Context, d digest.Digest, r io.Reader) error {
			data, err := io.ReadAll(io.LimitReader(r, 64<<20))
			return errors.Join(err, m.Put(ctx, d, bytes.NewReader(data)))
		}}
	},
	"SourceFails": func(m *castest.Memory) cas.Store {
		return store{Memory: m, put: func(ctx context.Context, d digest.Digest, r io.Reader) error {
			data, _ := io.ReadAll(r) //nolint:errcheck // This is the fault.
			return m.Put(ctx, d, bytes.NewReader(data))
		}}
	},
	"Spaces": func(m *castest.Memory) cas.Store {
		one := func(d digest.Digest) digest.Digest {
			s, err := digest.ParseToken("sha256")
			if err != nil {
				panic(err)
			}
			if d, err = s.Parse(d.Proto()); err != nil {
				panic(err)
			}
			return d
		}
		return store{
			Memory: m,
			open: func(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
				return m.Open(ctx, one(d), offset)
			},
			put: func(ctx context.Context, d digest.Digest, r io.Reader) error { return m.Put(ctx, one(d), r) },
			missing: func(ctx context.Context, ds []digest.Digest) (out []digest.Digest, err error) {
				for _, d := range ds {
					missing, err := m.Missing(ctx, []digest.Digest{one(d)})
					if err != nil {
						return nil, err
					}
					if len(missing) > 0 {
						out = append(out, d)
					}
				}
				return out, nil
			},
		}
	},
	"MissingOrder": func(m *castest.Memory) cas.Store {
		return store{Memory: m, missing: func(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
			missing, err := m.Missing(ctx, ds)
			if len(missing) > 1 {
				missing[0], missing[1] = missing[1], missing[0]
			}
			return missing, err
		}}
	},
	"DoneContext": func(m *castest.Memory) cas.Store {
		return store{Memory: m, missing: func(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
			return m.Missing(context.WithoutCancel(ctx), ds)
		}}
	},
	"ContextEndsDuringRead": func(m *castest.Memory) cas.Store {
		return store{Memory: m, open: func(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
			r, err := m.Open(ctx, d, offset)
			if err != nil {
				return nil, err
			}
			return short{r}, nil
		}}
	},
}

// brokenUploads are the same for castest.RunResumer.
var brokenUploads = map[string]func(*castest.Resumable) cas.Store{
	"GoesOn": func(m *castest.Resumable) cas.Store {
		return uploads{Resumable: m, committed: func(context.Context, digest.Digest, string) (int64, error) { return 0, nil }}
	},
	"AnyOffset": func(m *castest.Resumable) cas.Store {
		return uploads{Resumable: m, putFrom: func(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
			if kept, err := m.Committed(ctx, d, upload); err == nil && offset > 0 && offset < kept {
				return cas.ErrNotKept
			}
			return m.PutFrom(ctx, d, upload, offset, r)
		}}
	},
	"NotKept": func(m *castest.Resumable) cas.Store {
		return uploads{Resumable: m, putFrom: func(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
			data, err := io.ReadAll(r)
			return m.PutFrom(ctx, d, upload, offset, io.MultiReader(bytes.NewReader(data), iotest.ErrReader(cmp.Or(err, io.EOF))))
		}}
	},
	"MismatchOfParts": func(m *castest.Resumable) cas.Store {
		wrong := false
		return uploads{
			Resumable: m,
			committed: func(ctx context.Context, d digest.Digest, upload string) (int64, error) {
				kept, err := m.Committed(ctx, d, upload)
				if wrong {
					kept++
				}
				return kept, err
			},
			putFrom: func(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
				err := m.PutFrom(ctx, d, upload, offset, r)
				wrong = errors.Is(err, cas.ErrMismatch)
				return err
			},
		}
	},
	"UploadsAreSeparate": func(m *castest.Resumable) cas.Store {
		return uploads{
			Resumable: m,
			committed: func(ctx context.Context, d digest.Digest, _ string) (int64, error) { return m.Committed(ctx, d, "") },
			putFrom: func(ctx context.Context, d digest.Digest, _ string, offset int64, r io.Reader) error {
				return m.PutFrom(ctx, d, "", offset, r)
			},
		}
	},
}

// brokenFrames are the same for castest.RunFrames.
var brokenFrames = map[string]func(*castest.Memory) cas.Store{
	"FrameOffsets": func(m *castest.Memory) cas.Store {
		return framed{m, func(ctx context.Context, d digest.Digest, _ int64) (io.ReadCloser, error) {
			return opener{m}.OpenFrames(ctx, d, 0)
		}}
	},
	"FramesAbsent": func(m *castest.Memory) cas.Store {
		return framed{m, func(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
			r, err := opener{m}.OpenFrames(ctx, d, offset)
			if errors.Is(err, cas.ErrNotFound) {
				return io.NopCloser(strings.NewReader("")), nil
			}
			return r, err
		}}
	},
	"FramesCompress": func(m *castest.Memory) cas.Store {
		return framed{m, func(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
			r, err := m.Open(ctx, d, offset)
			if err != nil {
				return nil, err
			}
			data, err := io.ReadAll(r)
			var frames []byte
			for _, b := range data {
				frames = compress.Append(frames, []byte{b})
			}
			return io.NopCloser(bytes.NewReader(frames)), errors.Join(err, r.Close())
		}}
	},
	"FramesDoneContext": func(m *castest.Memory) cas.Store {
		return framed{m, func(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
			return opener{m}.OpenFrames(context.WithoutCancel(ctx), d, offset)
		}}
	},
}

// uploads is Resumable with other methods.
type uploads struct {
	*castest.Resumable
	committed func(context.Context, digest.Digest, string) (int64, error)
	putFrom   func(context.Context, digest.Digest, string, int64, io.Reader) error
}

func (s uploads) Committed(ctx context.Context, d digest.Digest, upload string) (int64, error) {
	if s.committed != nil {
		return s.committed(ctx, d, upload)
	}
	return s.Resumable.Committed(ctx, d, upload)
}

func (s uploads) PutFrom(ctx context.Context, d digest.Digest, upload string, offset int64, r io.Reader) error {
	if s.putFrom != nil {
		return s.putFrom(ctx, d, upload, offset, r)
	}
	return s.Resumable.PutFrom(ctx, d, upload, offset, r)
}

// framed is Memory with frames of its own.
type framed struct {
	*castest.Memory
	open func(context.Context, digest.Digest, int64) (io.ReadCloser, error)
}

func (s framed) OpenFrames(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	return s.open(ctx, d, offset)
}

// store is Memory with other methods.
type store struct {
	*castest.Memory
	open    func(context.Context, digest.Digest, int64) (io.ReadCloser, error)
	put     func(context.Context, digest.Digest, io.Reader) error
	missing func(context.Context, []digest.Digest) ([]digest.Digest, error)
}

func (s store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if s.open != nil {
		return s.open(ctx, d, offset)
	}
	return s.Memory.Open(ctx, d, offset)
}

func (s store) Put(ctx context.Context, d digest.Digest, r io.Reader) error {
	if s.put != nil {
		return s.put(ctx, d, r)
	}
	return s.Memory.Put(ctx, d, r)
}

func (s store) Missing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	if s.missing != nil {
		return s.missing(ctx, ds)
	}
	return s.Memory.Missing(ctx, ds)
}

// short ends early instead of failing.
type short struct{ io.ReadCloser }

func (r short) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

const breakVariable = "CASTEST_BROKEN"

// TestBroken is run by TestSuiteFindsFaults in a process of its own.
func TestBroken(t *testing.T) {
	name := os.Getenv(breakVariable)
	if open := broken[name]; open != nil {
		castest.Run(t, func(testing.TB) cas.Store { return open(castest.NewMemory()) })
	}
	if open := brokenUploads[name]; open != nil {
		castest.RunResumer(t, func(testing.TB) cas.Store { return open(castest.NewResumable()) })
	}
	if open := brokenFrames[name]; open != nil {
		castest.RunFrames(t, func(testing.TB) cas.Store { return open(castest.NewMemory()) })
	}
}

// TestSuiteFindsFaults: each part of the suites can fail.
func TestSuiteFindsFaults(t *testing.T) {
	t.Parallel()
	names := slices.Concat(slices.Collect(maps.Keys(broken)), slices.Collect(maps.Keys(brokenUploads)), slices.Collect(maps.Keys(brokenFrames)))
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestBroken$/^"+name+"$")
			cmd.Env = append(os.Environ(), breakVariable+"="+name)
			out, err := cmd.CombinedOutput()
			if err == nil || !bytes.Contains(out, []byte("--- FAIL: TestBroken/"+name)) {
				t.Errorf("a store with a fault passes: %v\n%s", err, out)
			}
		})
	}
}
