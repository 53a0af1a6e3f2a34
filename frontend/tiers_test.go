package frontend_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"

	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/cas/memory"
	"github.com/jetfarm/jetfarm/frontend"
)

// tiered puts the tiers of a frontend before its store: memory, then files in dir.
func tiered(t testing.TB, dir string) func(*frontend.Config) {
	t.Helper()
	return func(cfg *frontend.Config) {
		files, err := disk.Open(t.Context(), disk.Config{Dir: dir, MaxBytes: 256 << 20, Source: cfg.Blobs, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatalf("disk.Open: %v", err)
		}
		t.Cleanup(func() { _ = files.Close() })
		small, err := memory.New(memory.Config{MaxBytes: 16 << 20, Source: files})
		if err != nil {
			t.Fatalf("memory.New: %v", err)
		}
		cfg.Blobs = small
	}
}

// cached returns the paths of the files of the disk tier.
func cached(t testing.TB, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(dir, "cas"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			paths = append(paths, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// Reads through the tiers are what reads of the store are: the first, which fills them, and later ones.
func TestTiersRead(t *testing.T) {
	dir := t.TempDir()
	h := start(t, tiered(t, dir))
	for _, size := range []int{1, 1000, 64 << 10, 64<<10 + 1, 3<<20 + 17} {
		data := random(size)
		d := h.put(t, data)
		for _, row := range []struct {
			name          string
			offset, limit int
		}{
			{"RD-1 whole", 0, 0},
			{"RD-1 whole again", 0, 0},
			{"RD-4 at the end", size, 0},
			{"RD-5 limit", 0, size/2 + 1},
			{"RD-5 limit in the middle", size / 2, size/4 + 1},
			{"RD-7 limit beyond", size / 3, 2 * size},
			{"RD-19 offset", size - 1, 0},
		} {
			t.Run(fmt.Sprintf("%s of %d bytes", row.name, size), func(t *testing.T) {
				got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String(), ReadOffset: int64(row.offset), ReadLimit: int64(row.limit)})
				wantCode(t, "Read", err, codes.OK)
				want := data[row.offset:]
				if row.limit > 0 {
					want = want[:min(row.limit, len(want))]
				}
				if !bytes.Equal(got, want) {
					t.Errorf("Read = %d bytes, want %d, or their content differs", len(got), len(want))
				}
			})
		}
	}
	if n := len(cached(t, dir)); n != 2 {
		t.Errorf("%d files, want those of the blobs above 64 KiB", n)
	}
}

// A flipped bit in a file of the disk tier never reaches a client unnoticed, and the next read is right.
func TestTiersDamagedFile(t *testing.T) {
	const size = 3<<20 + 17
	for _, at := range []int{0, 1 << 20, size - 1} {
		t.Run(fmt.Sprintf("RD-13 bit flipped at %d", at), func(t *testing.T) {
			dir := t.TempDir()
			h := start(t, tiered(t, dir))
			data := random(size)
			req := &bytestream.ReadRequest{ResourceName: h.put(t, data).String()}
			if _, err := h.read(t.Context(), req); err != nil {
				t.Fatalf("Read: %v", err)
			}
			path := cached(t, dir)[0]
			damaged := bytes.Clone(data)
			damaged[at] ^= 8
			if err := os.Chmod(path, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := h.read(t.Context(), req)
			wantCode(t, "Read of the damaged file", err, codes.DataLoss)
			if len(got) >= size {
				t.Error("all bytes of a damaged file")
			}
			if left := cached(t, dir); len(left) != 0 {
				t.Errorf("the damaged file is kept: %q", left)
			}
			if got, err := h.read(t.Context(), req); err != nil || !bytes.Equal(got, data) {
				t.Errorf("Read after that: %d bytes, %v", len(got), err)
			}
		})
	}
}

// A part of a large blob is read without the rest of it.
func TestTiersPartOfALargeBlob(t *testing.T) {
	t.Run("RD-19 offset in a large blob fetches no file", func(t *testing.T) {
		dir := t.TempDir()
		h := start(t, tiered(t, dir))
		data := random(24 << 20)
		d := h.put(t, data)
		for _, offset := range []int{1, 12 << 20, len(data) - 1} {
			got, err := h.read(t.Context(), &bytestream.ReadRequest{ResourceName: d.String(), ReadOffset: int64(offset), ReadLimit: 1000})
			if want := data[offset:min(offset+1000, len(data))]; err != nil || !bytes.Equal(got, want) {
				t.Errorf("Read from %d: %d bytes, %v", offset, len(got), err)
			}
		}
		if files := cached(t, dir); len(files) != 0 {
			t.Errorf("files %q", files)
		}
	})
}
