package worker_test

import (
	"testing"
)

// TestNextActionFindsNothingOfTheLast: workspaces serve action after action, and nothing that one does
// to its directories or streams is there for the next (row EXR-13).
func TestNextActionFindsNothingOfTheLast(t *testing.T) {
	for _, mode := range isolations() {
		t.Run(mode, func(t *testing.T) {
			f := newFarm(t)
			f.worker(mode, nil)
			for _, hostile := range []string{
				`touch left .hidden; mkdir d`,
				`chmod 777 . "${TMPDIR:-/tmp}"`,
				`touch "${TMPDIR:-/tmp}/left"`,
				`echo noise; echo noise >&2; ln /proc/self/fd/1 keep 2>/dev/null; cp /dev/stdout keep 2>/dev/null; true`,
				`setfattr -n user.x -v y . 2>/dev/null; true`,
				`rmdir "$PWD" 2>/dev/null; true`,
			} {
				f.ok(sh(hostile))
				res := f.ok(sh(`ls -A; ls -A "${TMPDIR:-/tmp}"; stat -c %a . "${TMPDIR:-/tmp}" | sort -u; echo end`))
				if got := f.blob(res.GetStdoutDigest()); got != "700\nend\n" {
					t.Errorf("after %q the next action sees %q", hostile, got)
				}
				if res.GetStderrDigest().GetSizeBytes() != 0 {
					t.Errorf("after %q the next action's standard error is %q", hostile, f.blob(res.GetStderrDigest()))
				}
			}
		})
	}
}
