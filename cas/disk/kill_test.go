package disk_test

import (
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/disk"
)

const killVariable = "DISK_TEST_DIR"

// TestVictim is run by TestKill in a process of its own. It fills and overfills a tier until it is
// killed.
func TestVictim(t *testing.T) {
	dir := os.Getenv(killVariable)
	if dir == "" {
		return
	}
	memory := castest.NewMemory()
	tier, err := disk.Open(t.Context(), disk.Config{Dir: dir, MaxBytes: 8 << 20, Source: memory, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(os.Stdout, "started")
	x := &fixture{Tier: tier, memory: memory, out: t.TempDir()}
	for {
		d, data := x.blob(t, 1000+x.links%50*1000)
		if err := os.Remove(x.link(t, d, x.links%3 == 0, data)); err != nil {
			t.Fatal(err)
		}
		d, data = x.blob(t, disk.Smallest+1+x.links%7*100_000)
		x.read(t, d, 0, data)
		d, data = castest.Blob(d.Space(), 5000)
		if err := adopt(t.Context(), x, d, data, filepath.Join(x.out, fmt.Sprint("a", x.links))); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKill: whenever a process is killed, the next one finds nothing but whole files.
func TestKill(t *testing.T) {
	x := &fixture{memory: castest.NewMemory(), source: &castest.Faulty{}, dir: t.TempDir(), out: t.TempDir()}
	for range 10 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestVictim$")
		cmd.Env = append(os.Environ(), killVariable+"="+x.dir, "TMPDIR="+x.out)
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
		timer := time.NewTimer(time.Duration(10+rand.IntN(150)) * time.Millisecond)
		<-timer.C
		cmd.Process.Kill()
		if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("the victim ended by itself: %v", err)
		}
		x.open(t, 8<<20)
		x.wantSound(t)
		files := x.files()
		if len(files) == 0 {
			t.Error("no file is left")
		}
		for _, path := range files {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if hash := castest.Space(t, "").Of(data).Hash(); !strings.Contains(path, hash) {
				t.Errorf("%s has the bytes of %s", path, hash)
			}
			if parts := strings.Split(filepath.Base(path), "."); len(parts) == 3 && parts[1] != fmt.Sprintf("%08x", crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))) {
				t.Errorf("%s has another sum", path)
			}
			if info := stat(t, path); info.Mode().Perm()&0o222 != 0 {
				t.Errorf("%s has mode %v", path, info.Mode())
			}
		}
		x.Close()
	}
}
