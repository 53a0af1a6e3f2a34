package app

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cmd/run"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
)

// Bazelrc prints the lines for a client.
type Bazelrc struct {
	GRPC     string `name:"grpc" help:"Address of the farm as Bazel reaches it." default:"127.0.0.1:8980" env:"JETFARM_GRPC"`
	Instance string `help:"Instance name: a key space of its own in the same farm." default:""`
	Config   string `name:"as" help:"Print the lines for 'bazel build --config=NAME' instead of for every build." default:"" placeholder:"NAME"`
}

func (b *Bazelrc) run(_ context.Context, p *process) error {
	if err := checkAddresses(map[string]string{"grpc": b.GRPC}); err != nil {
		return err
	}
	if _, err := digest.SpaceOf(b.Instance, repb.DigestFunction_SHA256, ""); err != nil {
		return run.UsageError{Err: fmt.Errorf("--instance: %w", err)}
	}
	command := "build"
	if b.Config != "" {
		command += ":" + b.Config
	}
	lines := []string{"# Execute on the jetfarm at " + b.GRPC + " and share its cache."}
	add := func(flag string) { lines = append(lines, command+" "+flag) }
	add("--remote_executor=grpc://" + b.GRPC)
	if b.Instance != "" {
		add("--remote_instance_name=" + b.Instance)
	}
	lines = append(lines, "# As many actions at once as the farm has room for, not as this machine has cores.")
	add("--jobs=64")
	add("--remote_timeout=600")
	lines = append(lines, "# Go on when the farm was away for a minute or two; Bazel's own 5 are over after half of one.")
	add("--remote_retries=20")
	lines = append(lines, "# Fail when the farm does, instead of building here without a word.")
	add("--noremote_local_fallback")
	lines = append(lines, "# The same environment on every machine, so that caches are shared.")
	add("--incompatible_strict_action_env")
	_, err := fmt.Fprintln(p.out, strings.Join(lines, "\n"))
	return err
}

// Version prints what this binary is.
type Version struct{}

func (*Version) run(_ context.Context, p *process) error {
	_, err := fmt.Fprintf(p.out, "jetfarm %s %s %s/%s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

// version is the module version, or the commit that the binary was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				v += "-" + setting.Value[:min(12, len(setting.Value))]
			}
		}
	}
	return v
}
