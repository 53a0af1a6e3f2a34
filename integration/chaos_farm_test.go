package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A role is a process of a farm that can be started again where it was.
type role struct {
	name string
	args []string
	p    *process
	// wires lead to it or from it, in the network.
	wires []*wire
}

func (r *role) start(t *testing.T) {
	t.Helper()
	r.p = start(t, r.name, r.args...)
}

// A chaosFarm has one or three broker nodes, two frontends and two workers, with a wire between each two
// that speak NATS to each other. Every process has the same addresses for its whole life.
type chaosFarm struct {
	brokers, frontends, workers []*role

	nats     []string // the brokers' URLs, past all wires
	monitors []string // where the brokers list their connections
	disk     string   // the first worker's data directory
	bounded  bool     // whether that is a small file system of its own
}

func startChaosFarm(t *testing.T, nodes int) *chaosFarm {
	t.Helper()
	f := &chaosFarm{}
	data := dataDir(t)
	clients, routes, monitors := freeAddresses(t, nodes), freeAddresses(t, nodes), freeAddresses(t, nodes)
	for i := range nodes {
		f.nats = append(f.nats, "nats://"+clients[i])
		f.monitors = append(f.monitors, "http://"+monitors[i])
		name := "broker" + strconv.Itoa(i)
		f.brokers = append(f.brokers, &role{name: name, args: []string{
			"broker", "--data", filepath.Join(data, name), "--listen", clients[i], "--name", name,
			"--nats-config", natsConfig(t, data, name, monitors[i]),
		}})
	}
	if nodes > 1 {
		f.route(t, routes)
	}
	for _, b := range f.brokers {
		b.start(t)
	}
	replicas, ports := nodes, freeAddresses(t, 2)
	for i, port := range ports {
		r := &role{name: "frontend" + strconv.Itoa(i)}
		r.args = []string{
			"frontend", "--nats", f.wired(t, r, clients), "--grpc", port, "--http", "127.0.0.1:0", "--replicas", strconv.Itoa(replicas),
		}
		f.frontends = append(f.frontends, r)
		r.start(t)
	}
	for i := range 2 {
		r := &role{name: "worker" + strconv.Itoa(i)}
		dir := filepath.Join(data, r.name)
		if i == 0 {
			f.disk, f.bounded = dir, mountSmall(t, dir)
		}
		r.args = []string{
			"worker", "--nats", f.wired(t, r, clients), "--data", dir, "--http", "127.0.0.1:0", "--name", r.name,
			"--concurrency", strconv.Itoa(slots), "--platform", "OSFamily=linux", "--disk-cache", "32MiB",
		}
		f.workers = append(f.workers, r)
		r.start(t)
	}
	return f
}

// route gives the brokers addresses for each other, a wire for each direction of each pair.
func (f *chaosFarm) route(t *testing.T, routes []string) {
	t.Helper()
	for i, b := range f.brokers {
		var others []string
		for j, other := range f.brokers {
			if i != j {
				w := startWire(t, routes[j])
				b.wires, other.wires = append(b.wires, w), append(other.wires, w)
				others = append(others, "nats://"+w.addr())
			}
		}
		b.args = append(b.args, "--cluster", routes[i], "--routes", strings.Join(others, ","))
	}
}

// wired returns the brokers' URLs as the role knows them.
func (f *chaosFarm) wired(t *testing.T, r *role, clients []string) string {
	t.Helper()
	var urls []string
	for i, b := range f.brokers {
		w := startWire(t, clients[i])
		r.wires, b.wires = append(r.wires, w), append(b.wires, w)
		urls = append(urls, "nats://"+w.addr())
	}
	return strings.Join(urls, ",")
}

// natsConfig writes what flags don't say: a port that lists connections, and no gossip about addresses,
// with which processes would find ways around the wires.
func natsConfig(t *testing.T, data, name, monitor string) string {
	t.Helper()
	path := filepath.Join(data, name+".conf")
	text := fmt.Sprintf("http: %q\ncluster { no_advertise: true, advertise: \"127.0.0.1:1\" }\n", monitor)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// mountSmall makes a folder a file system that is soon full, if this machine lets the test do so.
func mountSmall(t *testing.T, dir string) bool {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m,mode=0755"); err != nil {
		t.Logf("a full disk is not tried: no file system of its own for a worker: %v", err)
		return false
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return true
}

// stop ends all processes, those first that need the others.
func (f *chaosFarm) stop(t *testing.T) {
	t.Helper()
	for _, r := range slices.Concat(f.workers, f.frontends, f.brokers) {
		r.p.stop(t)
	}
}

// A fault is one cell of the matrix.
type fault struct {
	name   string
	happen func(t *testing.T, lasting time.Duration)
}

// faults returns the matrix: each kind of process, and each thing that may happen to it.
func (f *chaosFarm) faults() []fault {
	targets := []struct {
		name  string
		roles []*role
	}{{"frontend", f.frontends[:1]}, {"worker", f.workers[:1]}, {"whole broker", f.brokers}}
	if len(f.brokers) > 1 {
		targets = append(targets, struct {
			name  string
			roles []*role
		}{"broker node", f.brokers[:1]})
	}
	var all []fault
	for _, target := range targets {
		all = append(all,
			fault{target.name + " is killed", func(t *testing.T, _ time.Duration) { killAndRestart(t, target.roles) }},
			fault{target.name + " is frozen", func(t *testing.T, lasting time.Duration) { freeze(t, target.roles, lasting) }},
			fault{target.name + " is cut off", func(t *testing.T, lasting time.Duration) { cutOff(t, target.roles, lasting) }},
		)
	}
	if f.bounded {
		all = append(all, fault{"disk of a worker is full", f.fillDisk})
	}
	return all
}

func killAndRestart(t *testing.T, roles []*role) {
	t.Helper()
	for _, r := range roles {
		r.p.kill(t)
	}
	for _, r := range roles {
		r.start(t)
	}
}

func freeze(t *testing.T, roles []*role, lasting time.Duration) {
	t.Helper()
	for _, r := range roles {
		signal(t, r.p, syscall.SIGSTOP)
		defer signal(t, r.p, syscall.SIGCONT)
	}
	pause(t.Context(), lasting)
}

func signal(t *testing.T, p *process, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Errorf("%v for %s: %v", s, p.name, err)
	}
}

func cutOff(t *testing.T, roles []*role, lasting time.Duration) {
	t.Helper()
	for _, r := range roles {
		for _, w := range r.wires {
			w.swallow()
		}
	}
	pause(t.Context(), lasting)
	reset := 0
	for _, r := range roles {
		for _, w := range r.wires {
			reset += w.heal()
		}
	}
	if reset == 0 {
		t.Error("no connection went through the hole")
	}
}

// fillDisk takes all space of the first worker's disk, and gives it back.
func (f *chaosFarm) fillDisk(t *testing.T, lasting time.Duration) {
	t.Helper()
	path := filepath.Join(f.disk, "balloon")
	balloon, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}()
	defer balloon.Close()
	for end := time.Now().Add(lasting); time.Now().Before(end); pause(t.Context(), 20*time.Millisecond) {
		for block := make([]byte, 1<<20); len(block) > 0; {
			if _, err := balloon.Write(block); err != nil {
				block = block[:len(block)/2] // what is evicted meanwhile is taken as well
			}
		}
	}
}
