package app

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/jetfarm/jetfarm/worker/sandbox"
)

const (
	// wantedFiles is how many files a busy broker or worker may have open.
	wantedFiles = 65536
	// leastFiles is with how many nothing can be served.
	leastFiles = 1024
)

// machine checks what every role needs of the machine that it runs on, if one does.
func (d *Doctor) machine(e *exam) {
	data, err := dataDir(d.Data)
	if err != nil {
		e.fail("data directory", "set HOME, or name a directory with --data", "%v", err)
		return
	}
	if _, err := os.Lstat(data); errors.Is(err, fs.ErrNotExist) && !d.Worker && d.Data == "" {
		return // the farm is elsewhere
	}
	d.openFiles(e)
	d.dataDirectory(e, data)
}

func (*Doctor) openFiles(e *exam) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		e.warn("open files", "", "the limit is not known: %v", err)
		return
	}
	const fix = "raise the hard limit: LimitNOFILE=1048576 in a systemd unit, --ulimit nofile=1048576 for a container, or ulimit -Hn in a shell"
	switch most := limit.Max; {
	case most < leastFiles:
		e.fail("open files", fix, "a process may open %d files", most)
	case most < wantedFiles:
		e.warn("open files", fix, "a process may open %d files, a busy farm wants %d", most, wantedFiles)
	default:
		e.ok("open files", "a process may open %d", most)
	}
}

// dataDirectory checks a data directory and the disk that it is on.
func (*Doctor) dataDirectory(e *exam, data string) {
	info, err := os.Stat(data)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.ok("data directory", "%s is made at the first start", data)
		data = existing(data)
	case err != nil:
		e.fail("data directory", "let the user of jetfarm enter it, or name another with --data", "%v", err)
		return
	case !info.IsDir():
		e.fail("data directory", "name a directory with --data", "%s is a file", data)
		return
	}
	if err := unix.Access(data, unix.W_OK|unix.X_OK); err != nil {
		e.fail("data directory", "give it to the user that jetfarm runs as, or name another with --data", "%s can't be written: %v", data, err)
		return
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(data, &disk); err != nil {
		e.warn("disk", "", "its free space is not known: %v", err)
		return
	}
	block := uint64(disk.Bsize) //nolint:gosec // not negative
	free, total := disk.Bavail*block, disk.Blocks*block
	const fix = "free space on this disk, or bound what jetfarm keeps (--max-store of up and broker, --disk-cache of workers)"
	switch {
	case free < total/20 || free < 1<<30:
		e.fail("disk", fix, "%s of %s are free at %s, which is too little to store anything", bytesText(free), bytesText(total), data)
	case free < total/10:
		e.warn("disk", fix, "%s of %s are free at %s", bytesText(free), bytesText(total), data)
	default:
		e.ok("disk", "%s of %s are free at %s", bytesText(free), bytesText(total), data)
	}
}

// existing is the nearest folder above path that exists.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

// worker checks how actions can be kept apart here.
func (d *Doctor) worker(e *exam) {
	parent := ""
	if data, err := dataDir(d.Data); err == nil {
		parent = existing(filepath.Join(data, "worker"))
	}
	var weaker bool
	for _, mode := range []sandbox.Mode{sandbox.ModeNamespaces, sandbox.ModeUID} {
		err := tryIsolation(parent, mode)
		switch {
		case err == nil && !weaker:
			e.ok("isolation", "%s works here", mode)
			return
		case err == nil:
			e.warn("isolation", isolationFix, "only the weaker %s works here", mode)
			return
		}
		weaker = true
		e.warn("isolation "+string(mode), "", "%v", err)
	}
	e.fail("isolation", isolationFix, "actions can't be kept from each other's files and processes here; a worker takes --isolation none only")
}

const isolationFix = "run the worker as root, in a container with --privileged or CAP_SYS_ADMIN, and keep --data below folders that every user may enter (docs/SECURITY.md)"

// tryIsolation does what a worker does at its start.
func tryIsolation(parent string, mode sandbox.Mode) (err error) {
	dir, err := os.MkdirTemp(parent, ".doctor-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	pool, err := sandbox.Open(sandbox.Config{Mode: mode, Slots: 1, Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return pool.Close()
}
