package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// sharedDirs are the directories of a usual machine that everybody may write to.
func sharedDirs() []string { return append(privateDirs(), "/dev/shm") }

// removeLitter removes what a slot's user left in directories that it shares with others. None of its
// processes may be alive.
func removeLitter(uid int) error {
	var errs []error
	for _, dir := range sharedDirs() {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				continue
			}
			if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == uid {
				errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}
