package sandbox_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/jetfarm/jetfarm/worker/sandbox"
)

// TestSlotUserHasAName: tools that look themselves up find a name and a home that they can write to.
func TestSlotUserHasAName(t *testing.T) {
	if os.Geteuid() != 0 || !mayMount() {
		t.Skip("needs root with CAP_SYS_ADMIN")
	}
	r := newRig(t, sandbox.ModeNamespaces)
	s := r.sh(`id -un; id -gn; getent passwd $(id -u) | cut -d: -f6; touch ~/x && echo written; grep -c ^root: /etc/passwd`)
	s.Env = append(s.Env, "HOME=/tmp")
	r.run(s)
	got := strings.Fields(output(t, s.Stdout))
	if len(got) != 5 || !strings.HasPrefix(got[0], "jetfarm") || got[1] != got[0] || got[2] != "/tmp" || got[3] != "written" || got[4] != "1" {
		t.Errorf("output is %q, stderr %q", got, output(t, s.Stderr))
	}
	host, err := os.ReadFile("/etc/passwd")
	if err != nil || strings.Contains(string(host), fmt.Sprintf("%s:", got[0])) {
		t.Errorf("the machine's own user database has the user (%v)", err)
	}
}
