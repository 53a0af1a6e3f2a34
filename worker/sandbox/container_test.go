package sandbox_test

import (
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// A worker in a container and one on the host have different users, so that neither kills what the
// other runs.
func TestContainersHaveUsersOfTheirOwn(t *testing.T) {
	if os.Getenv("JETFARM_TEST_IN_CONTAINER") != "" {
		if first := sandbox.DefaultFirstUID(); first != sandbox.ContainerFirstUID {
			t.Errorf("first user in a PID namespace = %d, want %d", first, sandbox.ContainerFirstUID)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("a PID namespace needs root")
	}
	if first := sandbox.DefaultFirstUID(); first != sandbox.HostFirstUID && first != sandbox.ContainerFirstUID {
		t.Errorf("first user = %d", first)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestContainersHaveUsersOfTheirOwn$")
	cmd.Env = append(os.Environ(), "JETFARM_TEST_IN_CONTAINER=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	// /proc of the host tells the namespace of the process that reads it, too.
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("in a PID namespace: %v\n%s", err, out)
	}
	if sandbox.ContainerFirstUID+sandbox.MaxSlots+1 > sandbox.HostFirstUID {
		t.Error("the ranges overlap")
	}
}
