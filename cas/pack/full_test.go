package pack_test

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

	"github.com/jetfarm/jetfarm/cas/pack"
)

const fullVariable = "PACK_TEST_FULL"

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

// TestOnAFullDisk fills a file system of 4 MiB that the pack thinks it may have more of.
func TestOnAFullDisk(t *testing.T) {
	dir := os.Getenv(fullVariable)
	if dir == "" {
		t.Skip("TestFullDisk runs this")
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	cfg := config(filepath.Join(dir, "pack"), pack.MinBytes)
	p := open(t, cfg)
	ds, data := blobs(t, 1000)
	add := func(from, to int) {
		for i := from; i < to; i += 10 {
			p.Add(ds[i:i+10], data[i:i+10])
			p.Resume()
			p.Tend(t.Context())
		}
	}
	add(0, 900) // 9 MB
	full := held(t, p, ds, data)
	if full < 100 || full > 500 {
		t.Errorf("%d blobs are held on a full disk", full)
	}

	// Whoever stops here finds what could be written.
	stop := func() {
		if err := p.Close(); err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Errorf("Close: %v", err)
		}
	}
	stop()
	p = open(t, cfg)
	if n := held(t, p, ds, data); n < full || n > full+10 { // the last write may have got half way
		t.Errorf("%d blobs are held after a restart, want %d", n, full)
	}

	// A pack that sees how little is free gives all of it back, and begins again when there is more.
	cfg.Room = nil
	stop()
	p = open(t, cfg)
	if n := held(t, p, ds, data); n >= full {
		t.Errorf("%d blobs are held of %d, nothing was given back", n, full)
	}
	junk, err := os.Create(filepath.Join(dir, "junk"))
	if err != nil {
		t.Fatal(err)
	}
	for range 8 {
		if _, err := io.CopyN(junk, zeros{}, 16<<20); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("filling the file system: %v", err)
		}
		p.Tend(t.Context())
	}
	if n := held(t, p, ds, data); n > 0 {
		t.Errorf("%d blobs are held where nothing is free", n)
	}
	if err := errors.Join(junk.Close(), os.Remove(junk.Name())); err != nil {
		t.Fatal(err)
	}
	p.Resume()
	p.Tend(t.Context())
	add(900, 950)
	if n := held(t, p, ds[900:950], data[900:950]); n != 50 {
		t.Errorf("%d of 50 blobs are held after there was room again", n)
	}
	shut(t, p)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
