package integration_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// readyWithin bounds the start of a role on a machine that does other things as well.
	readyWithin = 60 * time.Second
	// stopWithin bounds a clean stop. No test leaves an action behind that would have to be drained.
	stopWithin = 30 * time.Second
)

// A process is one role of the farm, running.
type process struct {
	name  string
	cmd   *exec.Cmd
	log   transcript
	ready map[string]string // the fields of its ready line
	ended chan struct{}     // closed when the process is gone and err is set
	err   error
	// dumped says that the test itself had the process print its stacks and die.
	dumped bool
}

// start runs the binary with the arguments and returns when the process has said that it is ready.
// The process is stopped when the test ends; its log is printed if the test failed.
func start(t testing.TB, name string, args ...string) *process {
	t.Helper()
	p := &process{name: name, ended: make(chan struct{})}
	//nolint:noctx // the process is stopped by signals, as its users stop it
	p.cmd = exec.Command(binary(t), args...)
	p.cmd.Stderr = &p.log
	// The tests may be killed by their timeout; nothing may outlive them.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = 5 * time.Second
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1)
	go p.follow(stdout, lines)
	t.Cleanup(func() {
		p.stop(t)
		if p.log.contains("WARNING: DATA RACE") {
			t.Errorf("%s has a data race", name)
		}
		if t.Failed() {
			t.Logf("%s (jetfarm %s) logged:\n%s", name, strings.Join(args, " "), p.log.tail(200))
		}
	})
	select {
	case line := <-lines:
		p.ready = fields(line)
	case <-p.ended:
		t.Fatalf("jetfarm %s ended before it was ready: %v", strings.Join(args, " "), p.err)
	case <-time.After(readyWithin): //nolint:forbidigo // one timer per start
		t.Fatalf("jetfarm %s is not ready after %v", strings.Join(args, " "), readyWithin)
	}
	return p
}

// follow hands the ready line over and waits for the end of the process.
func (p *process) follow(stdout io.Reader, ready chan<- string) {
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "ready ") {
			select {
			case ready <- lines.Text():
			default:
				fmt.Fprintln(&p.log, "a second ready line on stdout:", lines.Text())
			}
			continue
		}
		fmt.Fprintln(&p.log, "stdout:", lines.Text())
	}
	p.err = p.cmd.Wait()
	close(p.ended)
}

// field returns a field of the ready line, such as grpc.
func (p *process) field(t testing.TB, name string) string {
	t.Helper()
	value, ok := p.ready[name]
	if !ok || value == "" {
		t.Fatalf("%s: the ready line %v has no %s=", p.name, p.ready, name)
	}
	return value
}

// stop asks the process to end and fails the test unless it does so with exit code 0. A process
// that has been stopped or killed before is left alone.
func (p *process) stop(t testing.TB) {
	t.Helper()
	select {
	case <-p.ended:
		if code := p.cmd.ProcessState.ExitCode(); code > 0 && !p.dumped {
			t.Errorf("%s ended by itself with exit code %d", p.name, code)
		}
		return
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("stop %s: %v", p.name, err)
	}
	bound := time.NewTimer(stopWithin)
	defer bound.Stop()
	select {
	case <-p.ended:
		if p.err != nil {
			t.Errorf("%s did not stop cleanly on SIGTERM: %v", p.name, p.err)
		}
	case <-bound.C:
		t.Errorf("%s still runs %v after SIGTERM; its goroutines are in its log", p.name, stopWithin)
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
		time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
		<-p.ended
	}
}

// kill ends the process as a crash or a lost machine does and returns when it is gone.
func (p *process) kill(t testing.TB) {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatalf("kill %s: %v", p.name, err)
	}
	<-p.ended
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// fields parses "ready key=value key=value".
func fields(line string) map[string]string {
	values := map[string]string{}
	for _, word := range strings.Fields(line)[1:] {
		if key, value, ok := strings.Cut(word, "="); ok {
			values[key] = value
		}
	}
	return values
}

// A transcript keeps what a process writes.
type transcript struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *transcript) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *transcript) contains(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Contains(l.text.Bytes(), []byte(text))
}

// tail returns the last lines, at most n of them.
func (l *transcript) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(strings.TrimRight(l.text.String(), "\n"), "\n")
	if len(lines) > n {
		lines = append([]string{fmt.Sprintf("(%d lines before)", len(lines)-n)}, lines[len(lines)-n:]...)
	}
	return strings.Join(lines, "\n")
}
