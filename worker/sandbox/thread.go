package sandbox

import (
	"runtime"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/worker/contain"
)

// onThread runs f on an operating system thread that is used for nothing before and ends with it, so
// f may change what belongs to a thread: its user, its namespaces, its umask. A panic of f is an error.
//
// The first thread of a process can't end and what /proc shows of the process is what it looks like,
// so when the scheduler offers that one it is held back while f runs on another.
func onThread(f func() error) error {
	var g errgroup.Group
	g.Go(contain.Panics(func() error {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			return onThread(f)
		}
		return f()
	}))
	return g.Wait()
}
