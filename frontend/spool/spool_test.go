package spool_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/jetfarm/jetfarm/frontend/spool"
)

func TestSpool(t *testing.T) {
	dir := t.TempDir()
	pool := spool.NewPool(dir, 2<<20)
	for _, size := range []int{0, 1, 256 << 10, 256<<10 + 1, 1 << 20} {
		data := bytes.Repeat([]byte{1, 2, 3, 5, 7}, size/5+1)[:size]
		f := pool.New()
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 100_000)
			if _, err := f.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if f.Size() != int64(size) || pool.Used() != int64(size) {
			t.Errorf("size %d, used %d, want %d", f.Size(), pool.Used(), size)
		}
		for range 2 {
			got, err := io.ReadAll(f.Reader())
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes of %d, %v", len(got), size, err)
			}
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("files with names: %v, %v", left, err)
		}
		for range 2 {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
		if pool.Used() != 0 {
			t.Errorf("%d bytes are used after Close", pool.Used())
		}
	}
}

func TestSpoolIsBounded(t *testing.T) {
	pool := spool.NewPool(t.TempDir(), 1<<20)
	a, b := pool.New(), pool.New()
	if _, err := a.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Write([]byte{1}); !errors.Is(err, spool.ErrFull) {
		t.Errorf("error %v, want ErrFull", err)
	}
	if err := errors.Join(a.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Write([]byte{1}); err != nil {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	lost := spool.NewPool("/nonexistent", 1<<20).New()
	if _, err := lost.Write(make([]byte, 1<<19)); !errors.Is(err, spool.ErrFull) {
		t.Errorf("a directory that is not there: error %v, want ErrFull", err)
	}
	if err := lost.Close(); err != nil {
		t.Fatal(err)
	}
}
