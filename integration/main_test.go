package integration_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

// scratch is the folder of this run of the tests: the binary under test and what Bazel keeps.
var scratch string

func TestMain(m *testing.M) {
	var err error
	scratch, err = os.MkdirTemp("", "jetfarm-integration-")
	if err == nil {
		err = openToAll(scratch)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		shutdownBazel()
		if err := removeAll(scratch); err != nil {
			fmt.Fprintln(os.Stderr, "clean up:", err)
		}
		os.Exit(code)
	}))
}

// binary builds the program under test at its first call and returns its path.
func binary(t testing.TB) string {
	t.Helper()
	path, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(scratch, "jetfarm")
	args := []string{"build", "-o", path}
	if raceDetector {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, "../cmd/jetfarm")...)
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build jetfarm: %w\n%s", err, out)
	}
	return path, nil
})

// openToAll lets every user into a folder: where a worker can have users but no mounts of its own,
// they run actions below its data directory.
func openToAll(dir string) error { return os.Chmod(dir, 0o755) }

// removeAll removes a folder also when there are folders below it that may not be written, as
// Bazel's outputs are.
func removeAll(dir string) error {
	walk := func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return nil // what cannot be seen is reported by the removal
	}
	if err := filepath.WalkDir(dir, walk); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
