package integration_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	// composeStarts bounds what an engine, its images and a start of the farm take.
	composeStarts = 5 * time.Minute
	composeModule = "github.com/docker/compose/v2/cmd@v2.40.3"
)

// The farm of deployments/compose.yaml, with a real engine: any start order, builds while it is
// scaled, and the death of a worker's container. `make test-compose` runs it.
func TestCompose(t *testing.T) {
	if os.Getenv("JETFARM_COMPOSE") == "" {
		t.Skip("needs root and minutes; run it with: make test-compose")
	}
	b := useBazel(t)
	d := startDocker(t)
	d.importBase(t)
	d.compose(t, "build", "--quiet")
	// The broker comes last: whoever needs it waits.
	d.compose(t, "up", "--detach", "--scale", "worker=1", "--scale", "broker=0")
	d.compose(t, "up", "--detach", "--scale", "worker=1", "--wait", "--wait-timeout", "120")

	checkAll(t, b.build(t, d.endpoint(), "test", "//..."), ranRemotely)
	checkOutputs(t, b)

	// Each build is new to the farm, and is under way while the number of workers changes.
	build := func(salt string) *pending {
		b.clean(t)
		return b.background(t, d.endpoint(), "build", "//app", "//slow:all_slow",
			"--action_env=SALT="+salt, "--jobs=16")
	}
	up := build("up")
	d.compose(t, "up", "--detach", "--no-recreate", "--scale", "worker=4")
	checkAll(t, up.wait(t), ranRemotely)
	if got := len(d.workers(t)); got != 4 {
		t.Fatalf("%d worker containers, want 4", got)
	}

	down := build("down")
	d.awaitSleepers(t)
	d.compose(t, "up", "--detach", "--no-recreate", "--scale", "worker=2")
	checkAll(t, down.wait(t), ranRemotely)

	killed := build("killed")
	d.awaitSleepers(t)
	d.run(t, "kill", d.workers(t)[0])
	checkAll(t, killed.wait(t), ranRemotely)

	d.compose(t, "down", "--volumes", "--timeout", "60")
	if left := d.run(t, "ps", "--all", "--quiet"); left != "" {
		t.Errorf("containers are left: %s", left)
	}
}

// A docker is an engine of the test's own.
type docker struct {
	dir, socket, config string
	grpc, http          string // ports on this host
}

func startDocker(t *testing.T) *docker {
	t.Helper()
	for _, tool := range []string{"dockerd", "docker", "iptables", "debootstrap"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v; as root: apt-get install -y --no-install-recommends docker.io iptables debootstrap", err)
		}
	}
	dir := dataDir(t)
	ports := freePorts(t, 2)
	d := &docker{dir: dir, socket: filepath.Join(dir, "docker.sock"), config: filepath.Join(dir, "config"), grpc: ports[0], http: ports[1]}
	d.installCompose(t)

	//nolint:noctx // ended by a signal, so that it unmounts what it has mounted
	engine := exec.Command("dockerd", "--host", "unix://"+d.socket, "--data-root", filepath.Join(dir, "data"),
		"--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"), "--log-level", "warn")
	engine.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	log := &transcript{}
	engine.Stdout, engine.Stderr = log, log
	if err := engine.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("containers:\n%s", d.logs())
		}
		_ = engine.Process.Signal(syscall.SIGTERM)
		if err := engine.Wait(); err != nil {
			t.Errorf("dockerd: %v\n%s", err, log.tail(50))
		}
	})
	await(t, composeStarts, "answer of the engine", func() bool {
		return d.command(context.Background(), "version").Run() == nil
	})
	return d
}

// installCompose puts the plugin where the engine's client looks for it. Debian has none, so it is
// built from its module when this machine has none either.
func (d *docker) installCompose(t *testing.T) {
	t.Helper()
	plugins := filepath.Join(d.config, "cli-plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	built := filepath.Join(cache, "jetfarm-test", "docker-compose-"+composeModule[strings.Index(composeModule, "@")+1:])
	if _, err := os.Stat(built); errors.Is(err, os.ErrNotExist) {
		t.Logf("building %s, which takes minutes", composeModule)
		module := t.TempDir()
		for _, step := range [][]string{
			{"mod", "init", "compose"},
			{"get", composeModule},
			{"build", "-o", built, strings.Split(composeModule, "@")[0]},
		} {
			cmd := exec.CommandContext(t.Context(), "go", step...)
			cmd.Dir = module
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("go %v: %v\n%s", step, err, out)
			}
		}
	}
	if err := os.Symlink(built, filepath.Join(plugins, "docker-compose")); err != nil {
		t.Fatal(err)
	}
}

// workerBase is what the actions of the workspace need, where Bazel's toolchains name it.
const workerBase = "jetfarm-test/base"

// importBase makes the workers' base image from Debian's packages. No registry is asked.
func (d *docker) importBase(t *testing.T) {
	t.Helper()
	root := filepath.Join(d.dir, "root")
	bootstrap := exec.CommandContext(t.Context(), "debootstrap", "--variant=minbase",
		"--include=gcc,g++,libc6-dev,default-jdk-headless", "bookworm", root)
	if out, err := bootstrap.CombinedOutput(); err != nil {
		t.Fatalf("debootstrap: %v\n%s", err, out)
	}
	archive := exec.CommandContext(t.Context(), "tar", "-C", root, "-c", ".")
	image := d.command(t.Context(), "import", "-", workerBase)
	pipe, err := archive.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	image.Stdin = pipe
	if err := archive.Start(); err != nil {
		t.Fatal(err)
	}
	out, err := image.CombinedOutput()
	if err := errors.Join(err, archive.Wait()); err != nil {
		t.Fatalf("docker import: %v\n%s", err, out)
	}
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
}

func (d *docker) endpoint() string { return "127.0.0.1:" + d.grpc }

func (d *docker) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+d.socket, "DOCKER_CONFIG="+d.config, "DOCKER_BUILDKIT=0",
		"JETFARM_WORKER_BASE="+workerBase, "JETFARM_GRPC_PORT="+d.grpc, "JETFARM_HTTP_PORT="+d.http)
	return cmd
}

// run returns what a command of the engine's client prints on stdout.
func (d *docker) run(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), composeStarts)
	defer cancel()
	cmd := d.command(ctx, args...)
	var failure bytes.Buffer
	cmd.Stderr = &failure
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("docker %s: %v\n%s%s", strings.Join(args, " "), err, out, failure.Bytes())
	}
	return strings.TrimSpace(string(out))
}

func (d *docker) compose(t *testing.T, args ...string) {
	t.Helper()
	d.run(t, append([]string{"compose", "--file", "../deployments/compose.yaml"}, args...)...)
}

// workers returns the running worker containers.
func (d *docker) workers(t *testing.T) []string {
	t.Helper()
	return strings.Fields(d.run(t, "ps", "--quiet", "--filter", "label=com.docker.compose.service=worker"))
}

// awaitSleepers returns when actions of //slow:all_slow run.
func (d *docker) awaitSleepers(t *testing.T) {
	t.Helper()
	await(t, bazelWithin, "a running action", func() bool { return len(sleepers(t, allSlow)) > 0 })
}

// allSlow is how long the actions of //slow:all_slow sleep.
const allSlow = "2.0411"

// logs is what the containers wrote.
func (d *docker) logs() string {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := d.command(ctx, "compose", "--file", "../deployments/compose.yaml", "logs", "--no-color", "--tail", "100").CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s(%v)", out, err)
	}
	return string(out)
}
