package sandbox

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// A worker in a container and one on the host have different users, so that neither kills what the
// other runs.
func TestContainersHaveUsersOfTheirOwn(t *testing.T) {
	if os.Getenv("JETFARM_TEST_IN_CONTAINER") != "" {
		if first := defaultFirstUID(); first != containerFirstUID {
			t.Errorf("first user in a PID namespace = %d, want %d", first, containerFirstUID)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("a PID namespace needs root")
	}
	if first := defaultFirstUID(); first != hostFirstUID && first != containerFirstUID {
		t.Errorf("first user = %d", first)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestContainersHaveUsersOfTheirOwn$") //nolint:gosec // this test
	cmd.Env = append(os.Environ(), "JETFARM_TEST_IN_CONTAINER=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	// /proc of the host tells the namespace of the process that reads it, too.
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("in a PID namespace: %v\n%s", err, out)
	}
	if containerFirstUID+MaxSlots+1 > hostFirstUID {
		t.Error("the ranges overlap")
	}
}
