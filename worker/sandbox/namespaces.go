package sandbox

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// privateDirs are the directories of a usual machine that everybody may write to. In ModeNamespaces
// they are one directory of the run.
func privateDirs() []string { return []string{"/tmp", "/var/tmp", "/run/lock"} }

// shmSize bounds /dev/shm of a run, which is memory.
const shmSize = "1g"

// enter gives the calling thread a mount namespace in which root is at the pool's mountpoint and
// scratch is what is at privateDirs, and an IPC namespace. The mounts end with the last process in it.
func (s *Slot) enter(root, scratch string) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWIPC); err != nil {
		return fmt.Errorf("unshare mount and ipc namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	rootTree, err := cloneTree(root)
	if err != nil {
		return err
	}
	defer closeTree(rootTree)
	for _, f := range s.files {
		if err := bind(f.source, f.target); err != nil {
			return err
		}
	}
	for _, d := range privateDirs() {
		info, err := os.Lstat(d)
		if err != nil || !info.IsDir() {
			continue
		}
		// The path of scratch may lie below a directory that is covered next, so the tree of the
		// second directory is a clone of what is mounted on the first.
		if err := bind(scratch, d); err != nil {
			return err
		}
		scratch = d
	}
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
		if err := unix.Mount("tmpfs", "/dev/shm", "tmpfs", flags, "mode=1777,size="+shmSize); err != nil {
			return fmt.Errorf("mount /dev/shm: %w", err)
		}
	}
	return attach(rootTree, s.pool.mountpoint)
}

// bind makes what is at source appear at target, too.
func bind(source, target string) error {
	tree, err := cloneTree(source)
	if err != nil {
		return err
	}
	defer closeTree(tree)
	return attach(tree, target)
}

func cloneTree(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open_tree %s: %w", path, err)
	}
	return fd, nil
}

func closeTree(fd int) {
	_ = unix.Close(fd)
}

func attach(tree int, path string) error {
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount to %s: %w", path, err)
	}
	return nil
}
