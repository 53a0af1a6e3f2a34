package disk_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
)

func TestAdopt(t *testing.T) {
	x := start(t, 64<<20)
	for _, executable := range []bool{false, true} {
		d, data := castest.Blob(castest.Space(t, ""), 5000)
		path := x.dst()
		if err := os.WriteFile(path, data, 0o666); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 {
			if err := os.Chown(path, 65534, 65534); err != nil {
				t.Fatal(err)
			}
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := x.Adopt(t.Context(), d, executable, f); err != nil {
			t.Fatalf("Adopt: %v", err)
		}
		linked := x.link(t, d, executable, data)
		if !os.SameFile(stat(t, path), stat(t, linked)) {
			t.Error("the file was copied although it can be linked")
		}
		if owner := status(t, linked).Uid; int(owner) != os.Geteuid() {
			t.Errorf("the file belongs to %d", owner)
		}
		if err := x.Adopt(t.Context(), d, executable, f); err != nil {
			t.Errorf("Adopt again: %v", err)
		}
		x.wantSound(t)
	}
	if x.opens.Load() != 0 {
		t.Error("adopted blobs were fetched")
	}
}

func TestAdoptFromAnotherFileSystem(t *testing.T) {
	x := start(t, 64<<20)
	d, data := castest.Blob(castest.Space(t, ""), 5000)
	other, wrong := castest.Blob(castest.Space(t, ""), 5000)
	out := otherFileSystem(t)
	if err := adopt(t.Context(), x, d, data, filepath.Join(out, "a")); err != nil {
		t.Fatalf("Adopt: %v", err)
	}
	x.link(t, d, false, data)
	if err := adopt(t.Context(), x, other, wrong[:4999], filepath.Join(out, "b")); !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("Adopt of a file of another size: error %v", err)
	}
	wrong[0] ^= 1
	if err := adopt(t.Context(), x, other, wrong, filepath.Join(out, "c")); !errors.Is(err, cas.ErrMismatch) {
		t.Errorf("Adopt by copy of another content: error %v", err)
	}
	x.wantSound(t)
}

func TestAdoptLeavesExtendedAttributesBehind(t *testing.T) {
	x := start(t, 64<<20)
	d, data := castest.Blob(castest.Space(t, ""), 5000)
	path := x.dst()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(path, "user.x", []byte("y"), 0); err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			t.Skip("the file system has no extended attributes")
		}
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(x.Adopt(t.Context(), d, true, f), f.Close()); err != nil {
		t.Fatal(err)
	}
	linked := x.link(t, d, true, data)
	if n, err := unix.Getxattr(linked, "user.x", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("the cached file has %d bytes of user.x, %v", n, err)
	}
	if x.opens.Load() != 0 {
		t.Error("an adopted blob was fetched")
	}
	x.wantSound(t)
}

// TestHostileHolderOfALink is defect D-31: a user who is given a link, in a directory of its own,
// can't change the cached file by any means.
func TestHostileHolderOfALink(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can act as another user; without root workers use Copy")
	}
	x := start(t, 64<<20)
	open := func(path string) {
		for ; path != "/" && path != os.TempDir(); path = filepath.Dir(path) {
			if err := os.Chmod(path, 0o777); err != nil {
				t.Fatal(err)
			}
		}
	}
	open(x.out)
	linked, linkedData := x.blob(t, 10000)
	adopted, adoptedData := castest.Blob(castest.Space(t, ""), 10000)
	path := x.dst()
	if err := os.WriteFile(path, adoptedData, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(x.Adopt(t.Context(), adopted, true, f), f.Close()); err != nil {
		t.Fatal(err)
	}
	victims := []string{x.link(t, linked, false, linkedData), x.link(t, linked, true, linkedData), x.link(t, adopted, true, adoptedData), path}
	for i, victim := range victims {
		for _, attack := range []string{
			`echo evil >> "$0"`, `echo evil > "$0"`, `chmod u+w "$0"`, `chmod 4777 "$0"`, `truncate -s 0 "$0"`,
			`touch -d 2000-01-01 "$0"`, `setfattr -n user.x -v 1 "$0"`, `dd if=/dev/zero of="$0" conv=notrunc count=1`,
			`exec 3<"$0" && echo evil >> /proc/self/fd/3`, `ln "$0" "$0.other" && echo evil >> "$0.other"`,
		} {
			cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", attack, victim)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: true}}
			if out, err := cmd.CombinedOutput(); err == nil {
				t.Errorf("victim %d: %s succeeded: %s", i, attack, out)
			}
		}
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `rm -f "$0" && echo mine > "$0"`, victim)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: true}}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("victim %d: the directory is the attacker's, but: %s", i, out)
		}
	}
	x.link(t, linked, false, linkedData)
	x.link(t, linked, true, linkedData)
	x.link(t, adopted, true, adoptedData)
	x.wantSound(t)
}
