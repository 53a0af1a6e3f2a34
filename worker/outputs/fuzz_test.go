package outputs_test

import (
	"errors"
	"path/filepath"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/worker/outputs"
)

func FuzzOf(f *testing.F) {
	for _, s := range [][2]string{{"", "out"}, {"a/b", "../../x"}, {"a", "../../x"}, {"/", "/"}, {"a", ""}, {"a/..", ".."}, {"..", "a"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, dir, name string) {
		asked, err := outputs.Of(&repb.Command{WorkingDirectory: dir, OutputPaths: []string{name}})
		if err != nil {
			if !errors.Is(err, outputs.ErrInvalid) {
				t.Errorf("error is %v", err)
			}
			return
		}
		if len(asked) != 1 || asked[0].Name != name {
			t.Fatalf("asked for %+v", asked)
		}
		if at := asked[0].At; at != "" && (!filepath.IsLocal(at) || filepath.Clean(at) != at) {
			t.Errorf("%q in %q is at %q", name, dir, at)
		}
	})
}
