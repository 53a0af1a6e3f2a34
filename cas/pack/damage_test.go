package pack_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/pack"
)

// A segment that ends anywhere has the blobs before that, and nothing wrong.
func TestTornTail(t *testing.T) {
	dir := t.TempDir()
	p := open(t, config(dir, pack.MinBytes))
	ds, data := blobs(t, 20)
	p.Add(ds, data)
	torn := snapshot(t, dir)
	shut(t, p)
	path := files(t, torn, ".pack")[0]
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	end, before := int64(0), 0
	for i := range ds {
		size := pack.RecordSize(int64(len(data[i])))
		for _, cut := range []int64{0, 1, 27, 28, size / 2, size - 1} {
			for _, tail := range [][]byte{nil, make([]byte, 5000), []byte(strings.Repeat("JPK1", 2000))} {
				if err := os.WriteFile(path, append(whole[:end+cut:end+cut], tail...), 0o600); err != nil {
					t.Fatal(err)
				}
				p := open(t, config(torn, pack.MinBytes))
				got := held(t, p, ds, data)
				complete := cut == size-1 && tail != nil // what is missing may be padding
				if got != before && (!complete || got != before+1) {
					t.Errorf("cut %d bytes into blob %d: %d blobs are held, want %d", cut, i, got, before)
				}
				p.Add(ds, data)
				if got := held(t, p, ds, data); got != len(ds) {
					t.Errorf("cut %d bytes into blob %d: %d blobs are held after all were added", cut, i, got)
				}
				shut(t, p)
				for _, path := range append(files(t, torn, ".pack"), files(t, torn, ".table")...) {
					if err := os.Remove(path); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		end, before = end+size, before+1
	}
}

// A bit that flips anywhere, in a segment or in its table, costs blobs and never makes a wrong one.
func TestFlippedBits(t *testing.T) {
	dir := t.TempDir()
	p := open(t, config(dir, pack.MinBytes))
	ds, data := blobs(t, 20)
	p.Add(ds, data)
	killed := snapshot(t, dir)
	shut(t, p)
	r := rand.New(rand.NewPCG(1, 2))
	for name, from := range map[string]string{"with a table": dir, "without": killed} {
		for _, kind := range []string{".pack", ".table"} {
			for range 150 {
				x := snapshot(t, from)
				for _, path := range files(t, x, kind) {
					content, err := os.ReadFile(path)
					if err != nil {
						t.Fatal(err)
					}
					content[r.IntN(len(content))] ^= 1 << r.IntN(8)
					if err := os.WriteFile(path, content, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				p := open(t, config(x, pack.MinBytes))
				if n := held(t, p, ds, data); n < len(ds)-1 && (kind == ".table" || name == "with a table") {
					t.Errorf("%s, a bit of %s: %d blobs are held", name, kind, n)
				}
				p.Add(ds, data)
				if n := held(t, p, ds, data); n != len(ds) {
					t.Errorf("%s, a bit of %s: %d blobs are held after all were added", name, kind, n)
				}
				shut(t, p)
			}
		}
	}
}

// A disk that changes under a pack that runs is found out, too.
func TestDamageWhileItRuns(t *testing.T) {
	dir := t.TempDir()
	p := open(t, config(dir, pack.MinBytes))
	defer shut(t, p)
	ds, data := blobs(t, 20)
	p.Add(ds, data)
	for _, path := range files(t, dir, ".pack") {
		if err := os.Truncate(path, 40_000); err != nil {
			t.Fatal(err)
		}
	}
	if n := held(t, p, ds, data); n == 0 || n == len(ds) {
		t.Errorf("%d blobs are held", n)
	}
	p.Add(ds, data)
	if n := held(t, p, ds, data); n != len(ds) {
		t.Errorf("%d blobs are held after all were added", n)
	}
}

// What a deletion by hand leaves is removed, and what is not the pack's stays.
func TestStrayFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"3.table", "4.temp", "5.pack", "note.txt", "06.pack"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("stray"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := open(t, config(dir, pack.MinBytes))
	ds, data := blobs(t, 3)
	p.Add(ds, data)
	if n := held(t, p, ds, data); n != 3 {
		t.Errorf("%d blobs are held", n)
	}
	shut(t, p)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got, want := strings.Join(names, " "), "06.pack 6.pack 6.table lock note.txt"; got != want {
		t.Errorf("files %s, want %s", got, want)
	}
}

func FuzzOpen(f *testing.F) {
	dir := f.TempDir()
	p := open(f, config(dir, pack.MinBytes))
	ds, data := blobs(f, 5)
	p.Add(ds, data)
	shut(f, p)
	var seed [2][]byte
	for i, kind := range []string{".pack", ".table"} {
		var err error
		if seed[i], err = os.ReadFile(files(f, dir, kind)[0]); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(seed[0], seed[1])
	f.Add(seed[0], []byte{})
	f.Add([]byte("JPK1"), []byte("JPT1"))
	f.Fuzz(func(t *testing.T, segment, table []byte) {
		dir := t.TempDir()
		for name, content := range map[string][]byte{"7.pack": segment, "7.table": table, "8.temp": table, "x.pack": segment} {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p := open(t, config(dir, pack.MinBytes))
		held(t, p, ds, data)
		p.Add(ds, data)
		if n := held(t, p, ds, data); n != len(ds) {
			t.Errorf("%d blobs are held after all were added", n)
		}
		shut(t, p)
	})
}

const killVariable = "PACK_TEST_DIR"

// victims is how many blobs TestVictim adds again and again.
const victims = 3000

// TestVictim is run by TestKill in a process of its own. It adds blobs until it is killed, and says up
// to which it has.
func TestVictim(t *testing.T) {
	dir := os.Getenv(killVariable)
	if dir == "" {
		return
	}
	p := open(t, config(dir, pack.MinBytes))
	ds, data := blobs(t, victims)
	var group sync.WaitGroup
	group.Go(func() { _ = p.Run(t.Context()) }) //nolint:errcheck // it has no error
	fmt.Fprintln(os.Stdout, "started")
	for w := range 3 {
		group.Go(func() {
			for i := w; ; i = (i + 3) % victims {
				p.Add(ds[i:i+1], data[i:i+1])
				held(t, p, ds[i:i+1], data[i:i+1])
			}
		})
	}
	group.Wait()
}

// TestKill: whenever a process is killed, the next one finds nothing but whole blobs.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	ds, data := blobs(t, victims)
	found := 0
	for range 10 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestVictim$")
		cmd.Env = append(os.Environ(), killVariable+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Errorf("the victim did not start: %v", err)
		}
		timer := time.NewTimer(time.Duration(5+rand.IntN(100)) * time.Millisecond)
		<-timer.C
		cmd.Process.Kill()
		if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("the victim ended by itself: %v", err)
		}
		p := open(t, config(dir, pack.MinBytes))
		found += held(t, p, ds, data)
		if n := usage(t, dir); n > pack.MinBytes {
			t.Errorf("the files take %d bytes", n)
		}
		shut(t, p)
	}
	if found == 0 {
		t.Error("nothing was found after any kill")
	}
}

func BenchmarkPack(b *testing.B) {
	const many = 200_000
	p := open(b, config(b.TempDir(), 1<<30))
	defer shut(b, p)
	var ds []digest.Digest
	content := make([]byte, 2048)
	for i := range many {
		binary.LittleEndian.PutUint64(content, uint64(i))
		d := sha256(b).Of(content)
		p.Add([]digest.Digest{d}, [][]byte{content})
		ds = append(ds, d)
		if i%1000 == 0 {
			p.Tend(b.Context())
		}
	}
	b.Run("Get2KiB", func(b *testing.B) {
		for b.Loop() {
			if _, ok := p.Get(ds[rand.IntN(many)]); !ok {
				b.Fatal("a blob is not held")
			}
		}
	})
	next := many
	b.Run("Add2KiB", func(b *testing.B) {
		for b.Loop() {
			binary.LittleEndian.PutUint64(content, uint64(next))
			next++
			p.Add([]digest.Digest{sha256(b).Of(content)}, [][]byte{content})
			if next%1000 == 0 {
				p.Tend(b.Context())
			}
		}
	})
}
