package disk_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
)

const fullVariable = "DISK_TEST_FULL"

// TestFullDisk runs TestOnAFullDisk where it may mount a small file system.
func TestFullDisk(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestOnAFullDisk$", "-test.v")
	cmd.Env = append(os.Environ(), fullVariable+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, os.ErrPermission) {
		t.Skipf("this machine has no user namespaces: %v", err)
	}
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestOnAFullDisk")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestOnAFullDisk fills a file system of 8 MiB that the tier thinks it may have more of.
func TestOnAFullDisk(t *testing.T) {
	dir := os.Getenv(fullVariable)
	if dir == "" {
		t.Skip("TestFullDisk runs this")
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	x := &fixture{memory: castest.NewMemory(), source: &castest.Faulty{}, dir: filepath.Join(dir, "tier"), out: t.TempDir()}
	x.source.Store = x.memory
	x.open(t, 64<<20)

	// The tier makes room by evicting what it has.
	for range 5 {
		d, data := x.blob(t, 3<<20)
		x.read(t, d, 0, data)
		x.wantSound(t)
		if len(x.files()) == 0 {
			t.Error("nothing is held")
		}
		d, data = x.blob(t, 3<<20)
		dst := x.dst()
		if err := x.Link(t.Context(), d, false, dst); err != nil {
			t.Fatalf("Link: %v", err)
		}
		wantFile(t, dst, data, 0o444)
		x.wantSound(t)
	}

	// There is none to make: reads go on without the tier, links say so.
	junk, err := os.Create(filepath.Join(dir, "junk"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(junk, zeros{}, 16<<20); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the file system: %v", err)
	}
	midway, midwayData := x.blob(t, 7<<20)
	first := x.openAt(t.Context(), t, midway, 0)
	got, err := io.ReadAll(first)
	if err := errors.Join(err, first.Close()); err != nil || !bytes.Equal(got, midwayData) {
		t.Errorf("reading on a full disk: %d bytes, error %v", len(got), err)
	}
	x.wantSound(t)
	if err := x.Link(t.Context(), midway, false, x.dst()); !errors.Is(err, cas.ErrFull) {
		t.Errorf("Link on a full disk: error %v, want ErrFull", err)
	}
	x.wantSound(t)

	// When somebody else has made room, the tier uses it.
	if err := errors.Join(junk.Close(), os.Remove(junk.Name())); err != nil {
		t.Fatal(err)
	}
	x.read(t, midway, 0, midwayData)
	if len(x.files()) != 1 {
		t.Errorf("%d files", len(x.files()))
	}
	x.wantSound(t)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
