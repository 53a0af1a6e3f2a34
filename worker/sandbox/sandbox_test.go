package sandbox_test

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/jetfarm/jetfarm/worker/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// modes are the isolation modes that the user of the test can have.
func modes() []sandbox.Mode {
	switch {
	case os.Geteuid() != 0:
		return []sandbox.Mode{sandbox.ModeNone}
	case !mayMount():
		return []sandbox.Mode{sandbox.ModeUID, sandbox.ModeNone}
	}
	return []sandbox.Mode{sandbox.ModeNamespaces, sandbox.ModeUID, sandbox.ModeNone}
}

// mayMount tells whether the test may have namespaces: root of a container often may not.
func mayMount() bool { return exec.Command("unshare", "--mount", "--ipc", "true").Run() == nil } //nolint:noctx // ends at once

func inEveryMode(t *testing.T, f func(r *rig)) {
	t.Helper()
	for _, m := range modes() {
		t.Run(string(m), func(t *testing.T) { f(newRig(t, m)) })
	}
}

// rig is a slot with an execution root.
type rig struct {
	t       testing.TB
	pool    *sandbox.Pool
	slot    *sandbox.Slot
	base    string
	root    string
	scratch string
	runs    int
}

// openDir is a directory that every user can reach, unlike those of t.TempDir.
func openDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sandbox-test-*") //nolint:usetesting // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

func openPool(t testing.TB, m sandbox.Mode, dir string) *sandbox.Pool {
	t.Helper()
	pool, err := sandbox.Open(sandbox.Config{Mode: m, Slots: 1, Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pool.Close(); err != nil {
			t.Error(err)
		}
	})
	return pool
}

func newRig(t testing.TB, m sandbox.Mode) *rig {
	t.Helper()
	return newRigIn(t, m, openDir(t))
}

func newRigIn(t testing.TB, m sandbox.Mode, base string) *rig {
	t.Helper()
	r := &rig{t: t, pool: openPool(t, m, base), base: base}
	if r.pool.Mode() != m {
		t.Fatalf("mode is %s, want %s", r.pool.Mode(), m)
	}
	slot, err := r.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.slot = slot
	r.root, r.scratch = filepath.Join(base, "root"), filepath.Join(base, "tmp")
	for _, d := range []string{r.root, r.scratch} {
		if err := errors.Join(os.Mkdir(d, 0o755), os.Chown(d, slot.UID(), slot.UID())); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// sh is a spec that runs a shell script with the standard PATH.
func (r *rig) sh(script string) sandbox.Spec {
	return r.spec("/bin/sh", "-c", script)
}

func (r *rig) spec(args ...string) sandbox.Spec {
	r.t.Helper()
	r.runs++
	s := sandbox.Spec{Root: r.root, Scratch: r.scratch, Args: args, Timeout: 20 * time.Second}
	for name, f := range map[string]**os.File{"stdout": &s.Stdout, "stderr": &s.Stderr} {
		file, err := os.OpenFile(filepath.Join(r.base, name+strconv.Itoa(r.runs)), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
		if err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() { _ = file.Close() })
		if err := file.Chown(r.slot.UID(), r.slot.UID()); err != nil {
			r.t.Fatal(err)
		}
		*f = file
	}
	return s
}

func (r *rig) run(s sandbox.Spec) sandbox.Result {
	r.t.Helper()
	res, err := r.slot.Run(r.t.Context(), s)
	if err != nil {
		r.t.Fatal(err)
	}
	return res
}

func output(t testing.TB, f *os.File) string {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestExitCodesAndSignals(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		for script, want := range map[string]int{
			"exit 0": 0, "exit 7": 7, "exit 255": 255,
			"kill -9 $$": 137, "kill -TERM $$": 143, "kill -ABRT $$": 134,
		} {
			if got := r.run(r.sh(script)).ExitCode; got != want {
				t.Errorf("%q: exit code %d, want %d", script, got, want)
			}
		}
	})
}

func TestEnvironmentIsExactlyTheCommands(t *testing.T) {
	t.Setenv("JETFARM_SECRET", "leaks")
	inEveryMode(t, func(r *rig) {
		t := r.t
		s := r.spec("/usr/bin/env")
		s.Env = []string{"A=1", "B="}
		r.run(s)
		got := strings.Split(strings.TrimSpace(output(t, s.Stdout)), "\n")
		want := []string{"A=1", "B=", "PATH=" + sandbox.DefaultPath}
		if r.pool.Mode() != sandbox.ModeNamespaces {
			want = append(want, "TMPDIR="+r.scratch)
		}
		if !slices.Equal(got, want) {
			t.Errorf("environment is %q, want %q", got, want)
		}
	})
}

func TestExecutableIsResolvedAsREAPISays(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		script := func(name, text string) {
			t.Helper()
			path := filepath.Join(r.root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte("#!/bin/sh\necho "+text+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		script("wd/tool", "here")
		script("wd/bin/tool", "in bin")
		script("tool", "above")
		for _, c := range []struct{ name, path, want string }{
			{"./tool", "/bin", "here"},
			{"bin/tool", "/bin", "in bin"},
			{"../tool", "/bin", "above"},
			{"tool", "nowhere:bin:/bin", "in bin"},
			{"tool", ":bin", "here"},
		} {
			s := r.spec(c.name)
			s.Dir, s.Env = "wd", []string{"PATH=" + c.path}
			r.run(s)
			if got := strings.TrimSpace(output(t, s.Stdout)); got != c.want {
				t.Errorf("%s with PATH %s ran %q, want %q", c.name, c.path, got, c.want)
			}
		}
		s := r.spec("true")
		if code := r.run(s).ExitCode; code != 0 {
			t.Errorf("true from the default PATH: exit code %d", code)
		}
	})
}

func TestSearchGoesOnAfterADirectoryThatTheUserCannotEnter(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		for dir, mode := range map[string]os.FileMode{"closed": 0o700, "bin": 0o755} {
			path := filepath.Join(r.root, dir)
			script := []byte("#!/bin/sh\necho " + dir + "\n")
			if err := errors.Join(os.Mkdir(path, 0o755), os.WriteFile(path+"/tool", script, 0o755), os.Chmod(path, mode)); err != nil {
				t.Fatal(err)
			}
		}
		want := "bin"
		if !r.pool.Protects() {
			want = "closed" // the user is the worker's
		}
		s := r.spec("tool")
		s.Env = []string{"PATH=closed:bin"}
		r.run(s)
		if got := strings.TrimSpace(output(t, s.Stdout)); got != want {
			t.Errorf("ran %q, want %q", got, want)
		}
		s = r.spec("tool")
		s.Env = []string{"PATH=closed"}
		_, err := r.slot.Run(t.Context(), s)
		if spawn, ok := errors.AsType[*sandbox.SpawnError](err); ok != r.pool.Protects() || ok && !errors.Is(spawn, syscall.EACCES) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestCommandThatEndsBeforeItsOutputIsLookedAt(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		for script, want := range map[string]string{
			"echo 0123456789; exit 3":            "standard output exceeds the limit of 10 bytes",
			"echo 0123456789 >&2; exit 3":        "standard error exceeds the limit of 10 bytes",
			"echo 012345678; exit 3":             "",
			"echo 0; echo 012345678; kill -9 $$": "standard output exceeds the limit of 10 bytes",
		} {
			s := r.sh(script)
			s.MaxOutput = 10
			if res := r.run(s); res.Exceeded != want || res.TimedOut || res.ExitCode == 0 {
				t.Errorf("%s: %+v", script, res)
			}
		}
	})
}

func TestWhatCannotStartIsASpawnError(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		write := func(name, text string, mode os.FileMode) {
			t.Helper()
			if err := os.WriteFile(filepath.Join(r.root, name), []byte(text), mode); err != nil {
				t.Fatal(err)
			}
		}
		write("plain", "#!/bin/sh\n", 0o644)
		write("interp", "#!/nope/interp\n", 0o755)
		write("binary", "\x7fELFgarbage", 0o755)
		write("text", "no interpreter line", 0o755)
		for _, args := range [][]string{
			{"nope"},
			{"./nope"},
			{"/nope/x"},
			{"./plain"},
			{"./interp"},
			{"./binary"},
			{"./text"},
			{"/tmp"},
			{"plain/x"},
			{"/bin/true", strings.Repeat("x", 200<<10)},
		} {
			_, err := r.slot.Run(t.Context(), r.spec(args...))
			if _, ok := errors.AsType[*sandbox.SpawnError](err); !ok {
				t.Errorf("%.40q: error %v, want a SpawnError", args, err)
			}
		}
	})
}

func TestStandardInputIsEmpty(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		s := r.spec("/bin/cat")
		if res := r.run(s); res.ExitCode != 0 || output(t, s.Stdout) != "" {
			t.Errorf("cat: %+v, output %q", res, output(t, s.Stdout))
		}
	})
}

func TestOutputDevicesCanBeOpened(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		s := r.sh("echo out >> /dev/stdout; echo err >> /dev/stderr")
		if res := r.run(s); res.ExitCode != 0 || output(t, s.Stdout) != "out\n" || output(t, s.Stderr) != "err\n" {
			t.Errorf("%+v: stdout %q, stderr %q", res, output(t, s.Stdout), output(t, s.Stderr))
		}
	})
}

func TestActionCannotChangeFilesOfTheWorker(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		if !r.pool.Protects() {
			t.Log("this mode does not protect: inputs are copies")
			return
		}
		cached := filepath.Join(r.base, "cached")
		if err := os.WriteFile(cached, []byte("good"), 0o444); err != nil {
			t.Fatal(err)
		}
		for _, script := range []string{
			"echo evil >> input", "echo evil > input", "chmod u+w input", "chmod 777 input && echo evil > input",
			"truncate -s 0 input", "chown $(id -u) input", "ln input other && echo evil > other",
			"rm -f input; echo evil > input", "mv input moved; echo evil > moved", "touch -d 2001-01-01 input",
			"unshare -Ur sh -c 'chmod 777 input; echo evil > input'",
		} {
			input := filepath.Join(r.root, "input")
			_ = os.Remove(input)
			if err := os.Link(cached, input); err != nil {
				t.Fatal(err)
			}
			before, err := os.Stat(cached)
			if err != nil {
				t.Fatal(err)
			}
			r.run(r.sh(script))
			b, err := os.ReadFile(cached)
			if err != nil || string(b) != "good" {
				t.Fatalf("after %q the cached file is %q, %v", script, b, err)
			}
			after, err := os.Stat(cached)
			if err != nil || after.Mode() != before.Mode() || !after.ModTime().Equal(before.ModTime()) ||
				after.Sys().(*syscall.Stat_t).Uid != 0 {
				t.Fatalf("after %q the cached file is %v, was %v", script, after, before)
			}
		}
	})
}

func TestRunsLeaveNothingForTheNext(t *testing.T) {
	inEveryMode(t, func(r *rig) {
		t := r.t
		if r.pool.Mode() == sandbox.ModeNone {
			return
		}
		name := "litter" + marker(t)
		r.run(r.sh("for d in /tmp /var/tmp /dev/shm /run/lock; do mkdir -p $d/" + name + "/a; done; ipcmk -M 64"))
		for _, d := range []string{"/tmp", "/var/tmp", "/dev/shm", "/run/lock"} {
			if _, err := os.Lstat(filepath.Join(d, name)); err == nil {
				t.Errorf("%s/%s is left on the host", d, name)
			}
		}
		if err := errors.Join(os.RemoveAll(r.scratch), os.Mkdir(r.scratch, 0o755)); err != nil {
			t.Fatal(err)
		}
		if code := r.run(r.sh("! ls -d /tmp/" + name + " /dev/shm/" + name)).ExitCode; code != 0 {
			t.Error("the next run sees it")
		}
	})
}

func TestNamespacesShowOnePathAndNoSetuid(t *testing.T) {
	if os.Geteuid() != 0 || !mayMount() {
		t.Skip("needs root with CAP_SYS_ADMIN")
	}
	// The directories of t.TempDir are closed to other users.
	r := newRigIn(t, sandbox.ModeNamespaces, t.TempDir())
	s := r.sh("pwd; echo x > made; su -c true || echo refused; grep NoNewPrivs /proc/self/status; umask")
	r.run(s)
	want := r.pool.Mountpoint() + "\nrefused\nNoNewPrivs:\t1\n0022\n"
	if got := output(t, s.Stdout); got != want {
		t.Errorf("output is %q, want %q (stderr %q)", got, want, output(t, s.Stderr))
	}
	if _, err := os.Stat(filepath.Join(r.root, "made")); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(b), r.pool.Mountpoint()) {
		t.Errorf("the mount is visible outside: %v", err)
	}
}

func TestAutoFallsBackToWhatWorks(t *testing.T) {
	pool := openPool(t, sandbox.ModeAuto, t.TempDir())
	want := sandbox.ModeNone
	if os.Geteuid() == 0 && mayMount() {
		want = sandbox.ModeNamespaces
	}
	if pool.Mode() != want {
		t.Errorf("mode is %s, want %s", pool.Mode(), want)
	}
	if os.Geteuid() != 0 {
		return
	}
	_, err := sandbox.Open(sandbox.Config{Mode: sandbox.ModeUID, Slots: 1, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, sandbox.ErrMode) {
		t.Errorf("uid below a closed directory: error %v, want ErrMode", err)
	}
	_, err = sandbox.Open(sandbox.Config{Mode: "bogus", Slots: 1, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, sandbox.ErrMode) {
		t.Errorf("unknown mode: error %v, want ErrMode", err)
	}
}

func TestSlotsOfTwoPoolsHaveDistinctUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	seen := map[int]bool{}
	for range 2 {
		pool, err := sandbox.Open(sandbox.Config{Mode: sandbox.ModeUID, Slots: 3, Dir: openDir(t), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = pool.Close() })
		for range 3 {
			s, err := pool.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if seen[s.UID()] {
				t.Errorf("user %d is in two slots", s.UID())
			}
			seen[s.UID()] = true
		}
	}
}

func BenchmarkTrue(b *testing.B) {
	for _, m := range modes() {
		b.Run(string(m), func(b *testing.B) {
			r := newRig(b, m)
			s := r.spec("/bin/true")
			for b.Loop() {
				if res, err := r.slot.Run(b.Context(), s); err != nil || res.ExitCode != 0 {
					b.Fatal(res, err)
				}
			}
		})
	}
}
