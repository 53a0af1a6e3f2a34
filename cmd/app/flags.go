package app

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"github.com/dustin/go-humanize"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/chunking"
	"github.com/jetfarm/jetfarm/cmd/run"
	"github.com/jetfarm/jetfarm/frontend"
)

// size is a number of bytes that is written with a unit, as in 10GiB or 500MB.
type size int64

// UnmarshalText parses a size.
func (s *size) UnmarshalText(text []byte) error {
	n, err := humanize.ParseBytes(string(text))
	if err != nil || n > 1<<62 {
		return fmt.Errorf("%q is not a size such as 500MB or 10GiB", text)
	}
	*s = size(n)
	return nil
}

// vars are the defaults that depend on the machine.
func vars() kong.Vars {
	return kong.Vars{"cpus": strconv.Itoa(runtime.NumCPU()), "hostname": hostname(), "default_nats": defaultNATS}
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "worker"
	}
	return name
}

// dataDir returns the directory for a role's files: what the user asked for, or the user's state
// directory.
func dataDir(asked string) (string, error) {
	if asked != "" {
		return filepath.Abs(asked)
	}
	if state := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(state) {
		return filepath.Join(state, "jetfarm"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("no state directory for the data (give one with --data): %w", err)
	}
	return filepath.Join(home, ".local", "state", "jetfarm"), nil
}

// natsFlags are those of a role that reaches the broker over the network.
type natsFlags struct {
	NATS []string `name:"nats" help:"URLs of the NATS servers. The role waits for one to answer and reconnects for ever." default:"nats://127.0.0.1:4222" env:"JETFARM_NATS"`
}

// executionFlags are those of a role that executes actions.
type executionFlags struct {
	Concurrency    int           `help:"Actions that run at once." default:"${cpus}"`
	Platform       []string      `help:"A platform property that this worker offers, or with <= a number up to which actions may ask for it; repeat it for more." placeholder:"KEY=VALUE" sep:"none"`
	Isolation      string        `help:"How actions are kept apart: ${enum}. auto takes the strongest that works here." enum:"auto,namespaces,uid,none" default:"auto"`
	DrainTimeout   time.Duration `help:"How long running actions may go on after SIGTERM; what is left then runs on another worker." default:"30s"`
	DiskCache      size          `help:"Bytes of input files kept on this machine's disk." default:"10GiB"`
	DefaultTimeout time.Duration `help:"Timeout of an action that sets none." default:"1h"`
	MaxTimeout     time.Duration `help:"Longest timeout that an action may set." default:"24h"`
}

func (f *executionFlags) validate() (broker.Platform, error) {
	var errs []error
	if f.Concurrency < 1 || f.Concurrency > maxConcurrency {
		errs = append(errs, fmt.Errorf("--concurrency %d is not from 1 to %d", f.Concurrency, maxConcurrency))
	}
	if f.DrainTimeout < 0 {
		errs = append(errs, fmt.Errorf("--drain-timeout %v is negative", f.DrainTimeout))
	}
	if f.DefaultTimeout <= 0 || f.MaxTimeout < f.DefaultTimeout {
		errs = append(errs, fmt.Errorf("--default-timeout %v and --max-timeout %v must be positive and in this order", f.DefaultTimeout, f.MaxTimeout))
	}
	if f.DiskCache < minDiskCache {
		errs = append(errs, fmt.Errorf("--disk-cache %d bytes is less than %s", f.DiskCache, humanize.IBytes(uint64(minDiskCache))))
	}
	platform, err := broker.ParsePlatform(f.Platform)
	if err == nil && !platform.Declares(osFamily) {
		platform, err = broker.ParsePlatform(append([]string{osFamily + "=" + runtime.GOOS}, f.Platform...))
	}
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, run.UsageError{Err: err}
	}
	return platform, nil
}

// osFamily is the property that every worker has, so that no action for another system runs on it.
const osFamily = "OSFamily"

const (
	maxConcurrency = 1024
	minDiskCache   = 16 << 20
)

// serveFlags are those of a role that serves the API.
type serveFlags struct {
	compressionFlags   `embed:""`
	GRPC               string        `name:"grpc" help:"Address of the Remote Execution API." default:"127.0.0.1:8980" env:"JETFARM_GRPC"`
	ActionCacheUpdates bool          `help:"Let clients write the action cache. Every client then believes what any client writes." default:"false"`
	HTTPOpaqueResults  bool          `name:"http-opaque-results" help:"Let clients of the HTTP cache keep values below /ac/ that are no ActionResult, as ccache does." default:"false"`
	ACSize             size          `name:"ac-size" help:"Most bytes of action results; those that were not used for the longest time give way." default:"1GiB" env:"JETFARM_AC_SIZE"`
	MaxQueued          int64         `name:"max-queued" help:"Most operations of one instance name that wait for their turn, in the whole farm; more are refused with RESOURCE_EXHAUSTED." default:"100000" env:"JETFARM_MAX_QUEUED"`
	ExecuteRate        int           `name:"execute-rate" help:"Most Execute calls per second that this process takes; more are refused with RESOURCE_EXHAUSTED." default:"20000" env:"JETFARM_EXECUTE_RATE"`
	ChunkSize          size          `name:"chunk-size" help:"Average size of the chunks into which clients that ask for it split large blobs, a power of two from 1KiB to 8MiB. Chunks are stored beside the blobs. 0 offers no chunks." default:"512KiB"`
	Patience           time.Duration `help:"How long an action waits for a worker that can run it while there are only others, and a tenth of that if there was none within a week. 0 fails it at once." default:"5m"`
	Instance           []string      `help:"An instance name that is served; repeat it for more, with an empty one for clients that give none. Default: every name, each with blobs and results of its own." placeholder:"NAME" sep:"none"`
}

const (
	// minACSize is room for what a broker stores of the largest result.
	minACSize = 16 << 20
	// actionMemory bounds the action results that a frontend keeps in memory.
	actionMemory = 64 << 20
)

// farm is what a role that serves the API wants of the farm.
func (f *serveFlags) farm(replicas int) farmConfig {
	return farmConfig{
		replicas: replicas, patience: f.patience(), actionBytes: int64(f.ACSize), actionMemory: actionMemory, compression: f.CASCompression,
		submits: true, maxTenant: f.MaxQueued,
	}
}

// patience is what the broker's client calls it.
func (f *serveFlags) patience() time.Duration {
	if f.Patience == 0 {
		return -1
	}
	return f.Patience
}

// chunks are the parameters of chunks, or nil.
func (f *serveFlags) chunks() *chunking.Params {
	if f.ChunkSize == 0 {
		return nil
	}
	return &chunking.Params{Average: int(f.ChunkSize)}
}

// checkSizes reports bounds that cannot work.
func (f *serveFlags) checkSizes() error {
	if chunks := f.chunks(); chunks != nil {
		if err := chunks.Validate(); err != nil {
			return run.UsageError{Err: fmt.Errorf("--chunk-size: %w", err)}
		}
	}
	if f.MaxQueued < 1 || f.MaxQueued > broker.DefaultMaxQueued {
		return run.UsageError{Err: fmt.Errorf("--max-queued %d is not from 1 to %d, which is all that the queue holds", f.MaxQueued, broker.DefaultMaxQueued)}
	}
	if f.ExecuteRate < 1 {
		return run.UsageError{Err: fmt.Errorf("--execute-rate %d is not positive", f.ExecuteRate)}
	}
	if f.Patience < 0 {
		return run.UsageError{Err: fmt.Errorf("--patience %v is negative", f.Patience)}
	}
	if f.ACSize < minACSize {
		return run.UsageError{Err: fmt.Errorf("--ac-size %d bytes is less than %s", f.ACSize, humanize.IBytes(uint64(minACSize)))}
	}
	return nil
}

// checkInstances reports names that no request can have.
func (f *serveFlags) checkInstances() error {
	if err := frontend.Instances(f.Instance).Validate(); err != nil {
		return run.UsageError{Err: fmt.Errorf("--instance: %w", err)}
	}
	return nil
}

// httpFlags are those of a role with an HTTP port.
type httpFlags struct {
	Pprof bool `help:"Serve Go's profiles below /debug/pprof on the HTTP port."`
}

// checkAddresses reports every flag that is not HOST:PORT.
func checkAddresses(flags map[string]string) error {
	var errs []error
	for flag, address := range flags {
		if address == "" {
			continue
		}
		if _, port, err := net.SplitHostPort(address); err != nil {
			errs = append(errs, fmt.Errorf("--%s %q is not HOST:PORT: %w", flag, address, err))
		} else if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
			errs = append(errs, fmt.Errorf("--%s %q: the port is not from 0 to 65535", flag, address))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return run.UsageError{Err: err}
	}
	return nil
}

// workerName is the name of a worker as a NATS key: hostnames have dots.
func workerName(name string) string {
	clean := func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_':
			return r
		}
		return '-'
	}
	return strings.Map(clean, name)
}
