package sandbox

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// sweepBound is how long killed processes may take to be gone.
const sweepBound = 5 * time.Second

// sweepUID kills every process of a user and returns when none is left. A zombie whose parent does not
// take notice is as good as gone.
//
// kill(-1) reaches exactly the processes that the calling thread may signal, in one pass under the
// kernel's task list lock, so no fork gets past it. The thread's effective user is uid, which lets it
// signal that user's processes; its real and saved user is killer, which no process has, so that nobody
// can signal the thread in turn. The kernel spares the thread's own process. kill(-1) does not tell
// whether it found anything: getpriority of the user does.
func sweepUID(uid, killer int) error {
	if !userHasProcess(uid) {
		return nil
	}
	return onThread(func() error {
		if err := becomeKiller(uid, killer); err != nil {
			return err
		}
		return killUntilGone(uid)
	})
}

func killUntilGone(uid int) error {
	deadline := time.Now().Add(sweepBound)
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		if err := killAll(uid); err != nil {
			return err
		}
		if !userHasProcess(uid) {
			return nil
		}
		wait(pause)
		if pause < 2*time.Millisecond {
			continue
		}
		if !reapUser(uid) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes of user %d are still there %v after they were killed", uid, sweepBound)
		}
	}
}

// killAll kills what the calling thread may kill, which becomeKiller has made the processes of uid.
func killAll(uid int) error {
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill processes of user %d: %w", uid, err)
	}
	return nil
}

// killUID kills every process of a user and does not wait for their end.
func killUID(uid, killer int) error {
	return onThread(func() error {
		if err := becomeKiller(uid, killer); err != nil {
			return err
		}
		return killAll(uid)
	})
}

func becomeKiller(uid, killer int) error {
	_, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(killer), uintptr(uid), uintptr(killer))
	if e != 0 {
		return fmt.Errorf("setresuid: %w", e)
	}
	return nil
}

// userHasProcess tells whether a process, zombies included, has the real user uid.
func userHasProcess(uid int) bool {
	_, err := unix.Getpriority(unix.PRIO_USER, uid)
	return !errors.Is(err, unix.ESRCH)
}
