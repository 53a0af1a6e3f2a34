package disk_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/disk"
)

func TestRestartKeepsFiles(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 10000)
	x.link(t, d, false, data)
	x.link(t, d, true, data)
	x.reopen(t, 64<<20)
	x.wantSound(t)
	x.memory.Remove(d)
	x.link(t, d, false, data)
	x.link(t, d, true, data)
	if n := x.opens.Load(); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	x := start(t, 1<<20)
	_, err := disk.Open(t.Context(), disk.Config{Dir: x.dir, MaxBytes: 1 << 20, Source: x.memory, Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("Open of a directory in use: error %v", err)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, cfg := range []disk.Config{{MaxBytes: 1}, {Dir: t.TempDir()}, {Dir: "/dev/null/x", MaxBytes: 1}} {
		if _, err := disk.Open(t.Context(), cfg); err == nil {
			t.Errorf("Open(%+v) succeeded", cfg)
		}
	}
}

// TestKilledAtAnyPoint starts on what kills leave: temporary files, both generations of a file that
// was being replaced, and things that are not from here.
func TestKilledAtAnyPoint(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 10000)
	x.link(t, d, false, data)
	x.Close()
	file := x.files()[0]
	write := func(path string, content []byte) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(x.dir, "tmp", "77"), data[:100])
	write(filepath.Join(x.dir, "tmp", "sub", "78"), data)
	base, _, _ := strings.Cut(file, ".")
	if err := os.Link(file, base+".1000000"); err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(file)
	write(filepath.Join(filepath.Dir(file), "README"), nil)
	write(filepath.Join(filepath.Dir(file), name+"9"+"x"), nil)
	write(filepath.Join(x.dir, "cas", map[bool]string{true: "00", false: "01"}[!strings.HasPrefix(d.Hash(), "00")], name), data)
	write(filepath.Join(x.dir, "boot.new"), []byte("half"))

	x.open(t, 64<<20)
	x.wantSound(t)
	if files := x.files(); len(files) != 1 || files[0] != base+".1000000" {
		t.Errorf("files after the start: %q", files)
	}
	x.link(t, d, false, data)
	if n := x.opens.Load(); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
}

// reboot makes the files be from an earlier boot of the machine.
func (x *fixture) reboot(t *testing.T, damage func(path string)) {
	t.Helper()
	x.Close()
	if err := os.WriteFile(filepath.Join(x.dir, "boot"), []byte("another-boot 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range x.files() {
		damage(path)
	}
	x.open(t, 64<<20)
}

func TestFilesFromBeforeABootAreChecked(t *testing.T) {
	overwrite := func(content []byte) func(string) {
		return func(path string) {
			if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, content, 0o600), os.Chmod(path, 0o444)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, test := range map[string]struct {
		damage  func(string)
		fetches int64
	}{
		"intact": {func(string) {}, 1},
		"empty":  {overwrite(nil), 2},
		"zeros":  {overwrite(make([]byte, 10000)), 2},
		"gone": {func(path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			x := start(t, 64<<20)
			d, data := x.blob(t, 10000)
			x.link(t, d, false, data)
			x.reboot(t, test.damage)
			// A restart before the first use must not make the file trusted.
			x.reopen(t, 64<<20)
			x.link(t, d, true, data)
			x.link(t, d, false, data)
			x.reopen(t, 64<<20)
			x.link(t, d, false, data)
			if n := x.opens.Load(); n != test.fetches {
				t.Errorf("%d fetches, want %d", n, test.fetches)
			}
			x.wantSound(t)
		})
	}
}

// TestDamagedFile: what is read from a damaged file is an error, or is not read from it, and then
// repaired. Nobody gets all the bytes of a damaged file.
func TestDamagedFile(t *testing.T) {
	const size = 2<<20 + 100
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[at] ^= 0x40; return b }
	}
	for name, damage := range map[string]func([]byte) []byte{
		"short":              func(b []byte) []byte { return b[:3] },
		"empty":              func([]byte) []byte { return nil },
		"long":               func(b []byte) []byte { return append(b, 0) },
		"wrong":              func([]byte) []byte { return bytes.Repeat([]byte{1}, size) },
		"RD-13 first byte":   flip(0),
		"RD-13 in between":   flip(1<<20 + 1),
		"RD-13 last byte":    flip(size - 1),
		"RD-13 last message": flip(2<<20 + 1),
	} {
		for _, kind := range []string{"summed", "adopted", "before a boot"} {
			t.Run(name+" "+kind, func(t *testing.T) {
				x := start(t, 64<<20)
				d, data := x.blob(t, size)
				if kind == "adopted" {
					if err := adopt(t.Context(), x, d, data, x.dst()); err != nil {
						t.Fatal(err)
					}
				} else {
					x.link(t, d, true, data)
				}
				file := x.files()[0]
				if err := errors.Join(os.Chmod(file, 0o600), os.WriteFile(file, damage(bytes.Clone(data)), 0o600)); err != nil {
					t.Fatal(err)
				}
				if kind == "before a boot" {
					x.reboot(t, func(string) {})
				}
				r := x.openAt(t.Context(), t, d, 0)
				var got bytes.Buffer
				_, err := io.Copy(&got, r)
				r.Close()
				switch {
				case err == nil && !bytes.Equal(got.Bytes(), data):
					t.Error("wrong bytes and no error")
				case err != nil && !errors.Is(err, cas.ErrMismatch):
					t.Errorf("error %v", err)
				case err != nil && got.Len() >= size:
					t.Error("all bytes of a damaged file")
				}
				x.read(t, d, 0, data)
				x.wantSound(t)
			})
		}
	}
}

// TestSumsAreLearned: a file without a sum gets one from the first reader that has hashed it. So do
// files of versions that knew no sums.
func TestSumsAreLearned(t *testing.T) {
	x := start(t, 64<<20)
	d, data := x.blob(t, 2<<20)
	if err := adopt(t.Context(), x, d, data, x.dst()); err != nil {
		t.Fatal(err)
	}
	old := x.files()[0]
	x.reopen(t, 64<<20)
	x.read(t, d, 0, data)
	learned := x.files()
	if len(learned) != 1 || strings.Count(learned[0], ".") != strings.Count(old, ".")+1 {
		t.Errorf("%q became %q", old, learned)
	}
	x.wantSound(t)
	x.reopen(t, 64<<20)
	x.read(t, d, 0, data)
	if again := x.files(); !slices.Equal(again, learned) {
		t.Errorf("%q became %q", learned, again)
	}
	x.link(t, d, false, data)
	x.wantOpens(t, 0)
	x.wantSound(t)
}
