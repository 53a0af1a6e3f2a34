package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/jetfarm/jetfarm/cmd/run"
)

// CLI is the command line.
type CLI struct {
	Config   kong.ConfigFlag `help:"Read flags from a YAML file: keys are flag names, at the top or below the command's name." placeholder:"FILE.yaml" env:"JETFARM_CONFIG"`
	LogLevel string          `help:"Log lines of at least this level to stderr: debug, info, warn or error." enum:"debug,info,warn,error" default:"info"`

	Up       Up       `cmd:"" help:"Run the whole farm in one process. This is the way to try it."`
	Broker   Broker   `cmd:"" help:"Run a NATS server with JetStream, alone or as a member of a cluster."`
	Frontend Frontend `cmd:"" help:"Serve the Remote Execution API. Any number may run; they hold no state."`
	Worker   Worker   `cmd:"" help:"Execute actions. Any number may run; each takes what it has room for."`
	CAS      CAS      `cmd:"" name:"cas" help:"Look into the blobs of a running farm, put, get, list and verify them."`
	Doctor   Doctor   `cmd:"" help:"Check this machine and a running farm, and say what to fix."`
	Bazelrc  Bazelrc  `cmd:"" help:"Print the .bazelrc lines that make Bazel use this farm."`
	Status   Status   `cmd:"" help:"Tell what waits and what runs in a farm, and why."`
	Ops      Ops      `cmd:"" help:"List, show and cancel operations."`
	Workers  Workers  `cmd:"" help:"List, drain and undrain workers."`
	Probe    Probe    `cmd:"" help:"Ask a role whether it is ready; for health checks in containers."`
	Version  Version  `cmd:"" help:"Print the version."`
}

const description = `A Bazel Remote Execution farm on NATS JetStream.

Start one on this machine and build on it:

    jetfarm up
    bazel build //... --remote_executor=grpc://127.0.0.1:8980

The same farm as separate processes, on as many machines as you like:

    jetfarm broker   --data /var/lib/jetfarm --listen 0.0.0.0:4222
    jetfarm frontend --nats nats://broker:4222 --grpc 0.0.0.0:8980
    jetfarm worker   --nats nats://broker:4222

Every flag can be given as an environment variable, JETFARM_ and the flag's name in upper case with _
for -, or in the file of --config. A flag wins over the environment, and that over the file. Commands
that serve print one line "ready grpc=HOST:PORT http=HOST:PORT nats=URL" on stdout once they do, and
log to stderr. SIGTERM or Ctrl-C lets running work end; a second one stops at once. The exit code is 0
after a clean stop, 1 after a failure and 2 for bad usage.`

// process is what a command has of its surroundings.
type process struct {
	out io.Writer
	// progress is where a command that takes long tells how far it is.
	progress io.Writer
	log      *slog.Logger
}

// ready prints the line that says that a command serves.
func (p *process) ready(fields ...string) error {
	words := []string{"ready"}
	for i := 0; i+1 < len(fields); i += 2 {
		if fields[i+1] != "" {
			words = append(words, fields[i]+"="+fields[i+1])
		}
	}
	_, err := fmt.Fprintln(p.out, strings.Join(words, " "))
	return err
}

// exited is what kong's wish to exit, after --help, becomes.
type exited int

// Run parses the arguments and runs the command that they name until it ends or ctx does. An error
// of the arguments is a run.UsageError.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	defer func() {
		switch e := recover().(type) {
		case nil:
		case exited:
			if e != 0 {
				err = run.UsageError{Err: fmt.Errorf("exit code %d", e)}
			}
		default:
			panic(e)
		}
	}()
	var cli CLI
	parser, err := kong.New(&cli, kong.Name("jetfarm"), kong.Description(description), kong.DefaultEnvars("JETFARM"),
		kong.Configuration(loadYAML), kong.Writers(stdout, stderr), kong.Exit(func(code int) { panic(exited(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}), vars())
	if err != nil {
		return fmt.Errorf("command line: %w", err)
	}
	parsed, err := parser.Parse(args)
	if err != nil {
		return run.UsageError{Err: fmt.Errorf("%w (jetfarm --help lists the commands and flags)", err)}
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cli.LogLevel)); err != nil {
		return run.UsageError{Err: err}
	}
	p := &process{out: stdout, progress: stderr, log: slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))}
	command, ok := reflect.TypeAssert[interface {
		run(ctx context.Context, p *process) error
	}](parsed.Selected().Target.Addr())
	if !ok {
		return errors.New("command line: the command cannot run")
	}
	return command.run(ctx, p)
}
