package worker

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTrashOfAnyShapeIsDeleted: trees too deep for descriptors, directories closed to their owner, and
// links out of the tree, whose targets stay as they are.
func TestTrashOfAnyShapeIsDeleted(t *testing.T) {
	outside := t.TempDir()
	kept := filepath.Join(outside, "kept")
	if err := os.WriteFile(kept, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	trash := t.TempDir()
	d := &dirs{trash: trash}
	deep := filepath.Join(trash, "deep")
	if err := os.Mkdir(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(deep, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
		name := strings.Repeat("x", 1+i%20)
		if err := unix.Mkdirat(fd, name, 0o700); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if i == 64 || i == 1000 {
			err = unix.Fchmod(fd, 0)
		}
		if err := firstOf(err, unix.Close(fd)); err != nil {
			t.Fatal(err)
		}
		fd = next
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(trash, "link")); err != nil {
		t.Fatal(err)
	}
	if err := d.emptyOnce(); err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(trash); err != nil || len(names) != 0 {
		t.Errorf("trash has %v left (%v)", names, err)
	}
	info, err := os.Stat(outside)
	if _, missing := os.Stat(kept); err != nil || missing != nil || fmt.Sprint(info.Mode().Perm()) != "-rwxr-xr-x" {
		t.Errorf("what a link leads to was changed: %v, %v, %v", info, err, missing)
	}
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
