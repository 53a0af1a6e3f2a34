package outputs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/worker/outputs"
)

// An accomplice is an action in another slot that got descriptors of this one's directories and files.

// hashed collects the output "out" that has the content good.
func (r *rig) hashed(ctx context.Context) (*outputs.Collection, error) {
	r.t.Helper()
	asked, err := outputs.Of(paths("out"))
	if err != nil {
		r.t.Fatal(err)
	}
	made, err := r.collector.Collect(ctx, outputs.Source{Root: r.root, UID: r.uid, Space: r.space, Outputs: asked})
	if made != nil {
		r.t.Cleanup(func() { _ = made.Close() })
	}
	return made, err
}

func TestX_133_X_134_FileThatIsSwappedAfterItWasHashedIsNeitherAdoptedNorUploaded(t *testing.T) {
	good := []byte("good!")
	for name, swap := range map[string]func(r *rig, path string) error{
		"file": func(r *rig, path string) error {
			r.write("new", "evil!", 0o755)
			return os.Rename(filepath.Join(r.root, "new"), path)
		},
		"cached file": func(r *rig, path string) error {
			r.write("new", "evil!", 0o555)
			name := filepath.Join(r.root, "new")
			return errors.Join(os.Lchown(name, os.Geteuid(), os.Getegid()), os.Rename(name, path))
		},
		"pipe": func(r *rig, path string) error { // whose reader would wait
			if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o644)); err != nil {
				return err
			}
			f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
			r.t.Cleanup(func() { _ = f.Close() })
			return err
		},
		"link":    func(_ *rig, path string) error { return errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)) },
		"nothing": func(_ *rig, path string) error { return os.Remove(path) },
	} {
		for _, stored := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s stored %v", name, stored), func(t *testing.T) {
				r := newRig(t)
				d := r.space.Of(good)
				if stored {
					if err := r.store.Put(t.Context(), d, bytes.NewReader(good)); err != nil {
						t.Fatal(err)
					}
				}
				r.write("out/f", string(good), 0o755)
				made, err := r.hashed(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if err := swap(r, filepath.Join(r.root, "out/f")); err != nil {
					t.Fatal(err)
				}
				err = r.collector.Upload(t.Context(), made)
				if stored && err != nil {
					t.Errorf("upload of what the store has: %v", err)
				}
				if !stored && (!errors.Is(err, outputs.ErrRefused) || !strings.Contains(err.Error(), `"out/f" was changed`)) {
					t.Errorf("upload: error is %v", err)
				}
				next := filepath.Join(t.TempDir(), "in")
				err = r.collector.Files.Link(t.Context(), d, true, next)
				b, _ := os.ReadFile(next) //nolint:errcheck // no content is one that is not wanted
				if stored && (err != nil || !bytes.Equal(b, good)) || !stored && !errors.Is(err, cas.ErrNotFound) {
					t.Errorf("the input of the next action is %q, %v", b, err)
				}
			})
		}
	}
}

func TestSealLeavesTheFileOfAnotherUserAlone(t *testing.T) {
	r := newRig(t)
	if r.uid < 0 {
		t.Skip("needs root")
	}
	r.write("foreign", "same", 0o644)
	r.write("out", "same", 0o644)
	foreign, own := filepath.Join(r.root, "foreign"), filepath.Join(r.root, "out")
	if err := os.Chown(foreign, r.uid+1, r.uid+1); err != nil {
		t.Fatal(err)
	}
	var files [2]*os.File
	for i, name := range []string{foreign, own} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	var swapping sync.WaitGroup
	stop := make(chan struct{})
	swapping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if err := unix.Renameat2(unix.AT_FDCWD, foreign, unix.AT_FDCWD, own, unix.RENAME_EXCHANGE); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	defer swapping.Wait()
	defer close(stop)
	for range 500 {
		if _, err := r.hashed(t.Context()); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(files[0].Fd()), &st); err != nil || int(st.Uid) != r.uid+1 {
			t.Fatalf("the file of another user belongs to %d, %v", st.Uid, err)
		}
		if err := files[1].Chown(r.uid, r.uid); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOutputsThatAreTheSameFile(t *testing.T) {
	for range 10 {
		r := newRig(t)
		r.write("out/0", "same", 0o600)
		for i := range 20 {
			if err := os.Link(filepath.Join(r.root, "out/0"), filepath.Join(r.root, fmt.Sprintf("out/%d", i+1))); err != nil {
				t.Fatal(err)
			}
		}
		r.ok(paths("out"))
	}
}

func acl(uid uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, ^uint32(0)}, {2, 0, uid}, {4, 5, ^uint32(0)}, {0x10, 5, ^uint32(0)}, {0x20, 5, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

func TestFileWithExtendedAttributesIsNotAdopted(t *testing.T) {
	for name, value := range map[string][]byte{"system.posix_acl_access": acl(57997), "user.x": []byte("y")} {
		r := newRig(t)
		r.write("out", "tool", 0o755)
		path := filepath.Join(r.root, "out")
		if err := unix.Setxattr(path, name, value, 0); err != nil {
			if errors.Is(err, unix.ENOTSUP) {
				t.Skip("the file system has no extended attributes")
			}
			t.Fatal(err)
		}
		r.ok(paths("out"))
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Nlink != 1 || r.uid >= 0 && int(st.Uid) != r.uid {
			t.Errorf("%s: %d links, owner %d", name, st.Nlink, st.Uid)
		}
		in := filepath.Join(t.TempDir(), "in")
		if err := r.collector.Files.Link(t.Context(), r.space.Of([]byte("tool")), true, in); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Getxattr(in, name, nil); !errors.Is(err, unix.ENODATA) {
			t.Errorf("the next action's input has %d bytes of %s, %v", n, name, err)
		}
	}
}

// lease holds a lease on a file that breaks when the file is opened and is not given up.
func (r *rig) lease(path string) {
	r.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = f.Close() })
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		r.t.Fatal(err)
	}
}

func TestLeaseIsRefused(t *testing.T) {
	r := newRig(t)
	r.write("out", "x", 0o644)
	r.lease(filepath.Join(r.root, "out"))
	made, err := r.hashed(t.Context())
	if !errors.Is(err, outputs.ErrRefused) || !strings.Contains(err.Error(), `"out"`) || made == nil {
		t.Fatalf("error is %v", err)
	}
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.lease(log)
	if err := made.Stdout(r.space, log, 10); !errors.Is(err, outputs.ErrRefused) || !strings.Contains(err.Error(), "log") {
		t.Errorf("standard output: error is %v", err)
	}
}

func TestLeaseDoesNotOutliveTheContext(t *testing.T) {
	r := newRig(t)
	r.write("out", "x", 0o644)
	r.lease(filepath.Join(r.root, "out"))
	over := errors.New("over")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, over)
	defer cancel()
	if _, err := r.hashed(ctx); !errors.Is(err, over) {
		t.Errorf("error is %v", err)
	}
}

func TestNamesAndTargetsAreBounded(t *testing.T) {
	r := newRig(t)
	r.collector.Limits.Names = 2000
	r.write("few/f", "", 0o644)
	r.link("targets/a", strings.Repeat("x", 1000))
	r.link("targets/b", strings.Repeat("x", 1000))
	for i := range 30 {
		r.write(fmt.Sprintf("names/%d%s", i, strings.Repeat("n", 100)), "", 0o644)
	}
	for i := range 30 {
		r.write(fmt.Sprintf("%s/%d", strings.Repeat("p", 100), i), "", 0o644)
	}
	r.ok(paths("few"))
	for _, name := range []string{"targets", "names", strings.Repeat("p", 100)} {
		if _, err := r.collect(paths(name)); !errors.Is(err, outputs.ErrRefused) || !strings.Contains(err.Error(), "2000 bytes") {
			t.Errorf("%.10s: error is %v", name, err)
		}
	}
}
