package worker_test

import (
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/code"
)

// What a signal or a limit ended has the status OK, the exit code that a shell would say, and a message; it
// is not cached, and no attempt is used up (row D21).
func TestSignalsAndLimitsAreSaid(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		f.worker(isolation, nil)
		for script, want := range map[string]struct {
			exit    int32
			message string
		}{
			"kill -KILL $$": {137, "signal 9 (killed)"},
			"kill -SEGV $$": {139, "signal 11 (segmentation fault)"},
			"ulimit -f 1; exec dd if=/dev/zero of=out bs=1k count=100": {153, "larger than its limit"},
			"exit 3": {3, ""},
		} {
			a := sh(script)
			d := f.store(a)
			r := f.run(a)
			if statusCode(r) != code.Code_OK || r.GetResult().GetExitCode() != want.exit {
				t.Errorf("%s: the response is %v", script, r)
			}
			if m := r.GetMessage(); (m == "") != (want.message == "") || !strings.Contains(m, want.message) {
				t.Errorf("%s: the message is %q, want %q", script, m, want.message)
			}
			if _, err := f.cache.Get(t.Context(), d); err == nil {
				t.Errorf("%s is cached", script)
			}
		}
	})
}
