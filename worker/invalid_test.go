package worker_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker"
)

func TestMalformedActionsAreRefused(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", func(c *worker.Config) { c.MaxTimeout = time.Hour })
	file := func(name string) *repb.FileNode {
		return &repb.FileNode{Name: name, Digest: f.putBytes([]byte("x"), false)}
	}
	root := func(m *repb.Directory) func(*action) {
		return func(a *action) { a.action.InputRootDigest = f.put(m, false) }
	}
	outputs := func(paths ...string) func(*action) { return func(a *action) { a.command.OutputPaths = paths } }
	files := func(paths ...string) func(*action) { return func(a *action) { a.command.OutputFiles = paths } } //nolint:staticcheck // clients of REAPI 2.0 use these fields
	env := func(name, value string) func(*action) {
		return func(a *action) {
			a.command.EnvironmentVariables = append(a.command.EnvironmentVariables, &repb.Command_EnvironmentVariable{Name: name, Value: value})
		}
	}
	args := func(args ...string) func(*action) { return func(a *action) { a.command.Arguments = args } }
	timeout := func(d *durationpb.Duration) func(*action) { return func(a *action) { a.action.Timeout = d } }
	wd := func(dir string) func(*action) { return func(a *action) { a.command.WorkingDirectory = dir } }
	link := func(target string) func(*action) {
		return root(&repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "link", Target: target}}})
	}
	for _, c := range []struct {
		row, want string
		change    func(*action)
	}{
		{"EXV-1 command", "not a valid Command", func(a *action) { a.action.CommandDigest = f.putBytes([]byte("\xff\xff"), false) }},
		{"EXV-2 nil root", "input_root_digest", func(a *action) { a.action.InputRootDigest = &repb.Digest{} }},
		{"EXV-2 command", "command_digest", func(a *action) { a.action.CommandDigest = &repb.Digest{Hash: "zz", SizeBytes: 1} }},
		{"EXV-3", "no arguments", args()},
		{"EXV-3 empty name", "no arguments", args("")},
		{"EXV-4", "argument 1 contains NUL", args("/bin/true", "a\x00b")},
		{"EXV-5 empty", "environment variable", env("", "x")},
		{"EXV-5 equals", `"A=B"`, env("A=B", "x")},
		{"EXV-5 twice", "twice", env("PATH", "x")},
		{"EXV-5 NUL", "NUL", env("A", "\x00")},
		{"EXV-6", "absolute", outputs("/out")},
		{"EXV-7", "slash", outputs("out/")},
		{"EXV-8", "empty", files("")},
		{"EXV-9", "leaves the input root", outputs("../out")},
		{"EXV-10 dot", `"."`, outputs("./a")},
		{"EXV-10 double slash", "empty segment", outputs("a//b")},
		{"EXV-10 NUL", "NUL", outputs("a\x00")},
		{"EXV-10 segment", "255", outputs(strings.Repeat("a", 256))},
		{"EXV-10 path", "4096", outputs(strings.Repeat("a/", 2100) + "b")},
		{"EXV-11 twice", "twice", files("a", "a")},
		{"EXV-11 nested", "below the output file", files("a", "a/b")},
		{"EXV-14", "working directory", wd("nope")},
		{"EXV-15 absolute", "absolute", wd("/a")},
		{"EXV-15 slash", "slash", wd("a/")},
		{"EXV-15 escape", "leaves", wd("../x")},
		{"EXV-16", "output_node_properties", func(a *action) { a.command.OutputNodeProperties = []string{"bogus"} }},
		{"EXV-18 dotdot", "directory blobs/", root(&repb.Directory{Files: []*repb.FileNode{file("..")}})},
		{"EXV-18 slash", "slash or NUL", root(&repb.Directory{Files: []*repb.FileNode{file("a/b")}})},
		{"EXV-18 empty", "name of an entry", root(&repb.Directory{Files: []*repb.FileNode{file("")}})},
		{"EXV-18 long", "255", root(&repb.Directory{Files: []*repb.FileNode{file(strings.Repeat("n", 256))}})},
		{"EXV-19", "two entries", root(&repb.Directory{Files: []*repb.FileNode{file("a"), file("a")}})},
		{"EXV-19 across", "two entries", root(&repb.Directory{
			Files: []*repb.FileNode{file("a")}, Symlinks: []*repb.SymlinkNode{{Name: "a", Target: "b"}},
		})},
		{"EXV-20", "not sorted", root(&repb.Directory{Files: []*repb.FileNode{file("b"), file("a")}})},
		{"EXV-22", "digest", root(&repb.Directory{Files: []*repb.FileNode{{Name: "a"}}})},
		{"EXV-23", "not a Directory", root(&repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: f.putBytes([]byte("\xff text"), false)}}})},
		{"EXV-24 empty", "target is empty", link("")},
		{"EXV-24 NUL", "NUL", link("a\x00")},
		{"EXV-27", `because "a"`, func(a *action) {
			a.files = map[string]string{"a": "x"}
			a.command.OutputPaths = []string{"a/b"}
		}},
		{"X-86", `because "a"`, func(a *action) {
			a.links = map[string]string{"a": "/etc"}
			a.command.OutputPaths = []string{"a/passwd"}
		}},
		{"EXV-29", "argument list too long", args("/bin/true", strings.Repeat("x", 200<<10))},
		{"EXA-17", "1h0m0s", timeout(durationpb.New(2 * time.Hour))},
		{"EXA-17 ages", "maximum", timeout(&durationpb.Duration{Seconds: 300_000_000_000})},
		{"EXA-19 negative", "negative", timeout(durationpb.New(-time.Second))},
		{"EXA-19 invalid", "timeout", timeout(&durationpb.Duration{Seconds: 1, Nanos: -1})},
		{"EXR-14", `"nope"`, args("nope")},
		{"EXR-14 path", `"/nope/x"`, args("/nope/x")},
	} {
		a := sh("true")
		c.change(a)
		r := f.run(a)
		if statusCode(r) != code.Code_INVALID_ARGUMENT || !strings.Contains(r.GetStatus().GetMessage(), c.want) {
			t.Errorf("%s: status is %v, want INVALID_ARGUMENT with %q", c.row, r.GetStatus(), c.want)
		}
	}
}

func TestUnusualActionsAreAccepted(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	for name, change := range map[string]func(*action){
		"D16": func(a *action) {
			a.dirs, a.command.WorkingDirectory, a.command.OutputPaths = []string{"wd"}, "wd", []string{"../out"}
		},
		"D13 unsorted":   func(a *action) { a.command.OutputPaths = []string{"b", "a", "b"} },
		"D24":            func(a *action) { a.action.Timeout = durationpb.New(0) },
		"EXV-8":          func(a *action) { a.command.OutputPaths = []string{""} },
		"EXV-12":         func(a *action) { a.command.OutputDirectories = []string{"a", "a/b"} },                                //nolint:staticcheck // clients of REAPI 2.0 use these fields
		"D15":            func(a *action) { a.command.OutputFiles, a.command.OutputDirectories = []string{"a"}, []string{"a"} }, //nolint:staticcheck // clients of REAPI 2.0 use these fields
		"X-85":           func(a *action) { a.links = map[string]string{"abs": "/etc/passwd", "loop": "loop", "up": "../../.."} },
		"EXV-10 unicode": func(a *action) { a.files = map[string]string{"ü\\n": "x", "Foo": "a", "foo": "b"} },
	} {
		a := sh("true")
		change(a)
		if r := f.run(a); statusCode(r) != code.Code_OK || r.GetResult().GetExitCode() != 0 {
			t.Errorf("%s: %v", name, r)
		}
	}
}

func TestEveryMissingBlobIsListedOnce(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	sub := func(d *repb.Digest) string {
		parsed, err := f.space.Parse(d)
		if err != nil {
			t.Fatal(err)
		}
		return parsed.Blob()
	}
	of := func(content string) string { return f.space.Of([]byte(content)).Blob() }
	file := &action{files: map[string]string{"a": "gone", "b": "gone", "c": "here", "d/e": "gone too"}, withhold: map[string]bool{"gone": true, "gone too": true}}
	fileToo := &action{files: file.files, withhold: map[string]bool{"gone": true, "gone too": true, "command": true}}
	missingDir := f.space.Of([]byte("not uploaded"))
	for _, c := range []struct {
		name string
		make func() (digest.Digest, []string)
	}{
		{"EXA-6 action", func() (digest.Digest, []string) {
			d := f.space.Of([]byte("no action"))
			return d, []string{d.Blob()}
		}},
		{"files", func() (digest.Digest, []string) {
			a := sh("true")
			a.files, a.withhold = file.files, file.withhold
			return f.store(a), []string{of("gone"), of("gone too")}
		}},
		{"command and files", func() (digest.Digest, []string) {
			a := sh("true # another")
			a.files, a.withhold = fileToo.files, fileToo.withhold
			d := f.store(a)
			return d, []string{sub(a.action.GetCommandDigest()), of("gone"), of("gone too")}
		}},
		{"command, directory and file", func() (digest.Digest, []string) {
			a := sh("true # third")
			a.withhold = map[string]bool{"command": true}
			a.action.InputRootDigest = f.put(&repb.Directory{
				Files:       []*repb.FileNode{{Name: "f", Digest: f.space.Of([]byte("gone")).Proto()}},
				Directories: []*repb.DirectoryNode{{Name: "d", Digest: missingDir.Proto()}},
			}, false)
			d := f.store(a)
			return d, []string{sub(a.action.GetCommandDigest()), missingDir.Blob(), of("gone")}
		}},
		{"X-87 a size that lies", func() (digest.Digest, []string) {
			lie, err := f.space.New(f.space.Of([]byte("here")).Hash(), 1)
			if err != nil {
				t.Fatal(err)
			}
			a := sh("true # lie")
			a.action.InputRootDigest = f.put(&repb.Directory{Files: []*repb.FileNode{{Name: "f", Digest: lie.Proto()}}}, false)
			return f.store(a), []string{lie.Blob()}
		}},
	} {
		d, want := c.make()
		r := f.wait(f.submit(broker.Request{Action: d}))
		if statusCode(r) != code.Code_FAILED_PRECONDITION || len(r.GetStatus().GetDetails()) != 1 {
			t.Errorf("%s: status is %v", c.name, r.GetStatus())
			continue
		}
		var detail errdetails.PreconditionFailure
		if err := r.GetStatus().GetDetails()[0].UnmarshalTo(&detail); err != nil {
			t.Fatal(err)
		}
		got := map[string]int{}
		for _, v := range detail.GetViolations() {
			got[v.GetSubject()]++
			if v.GetType() != "MISSING" {
				t.Errorf("%s: type %q", c.name, v.GetType())
			}
		}
		for _, w := range want {
			if got[w] != 1 {
				t.Errorf("%s: %s is listed %d times", c.name, w, got[w])
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s: listed %v, want %v", c.name, got, want)
		}
	}
}

func TestPanicReturnsItsJobAlone(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	d := f.store(sh("echo panics"))
	var panics atomic.Int32
	f.blobs.Plan = func(op castest.Op, _ digest.Digest) castest.Fault {
		if op == castest.OpPut && panics.Add(1) == 1 {
			panic("injected")
		}
		return castest.Fault{}
	}
	r := f.wait(f.submit(broker.Request{Action: d}))
	if statusCode(r) != code.Code_OK || panics.Load() < 2 {
		t.Errorf("response is %v after %d puts", r, panics.Load())
	}
}

// An action that has killed as many workers as may try it ends, and no further worker runs it.
func TestX_113_ActionThatKillsItsWorkers(t *testing.T) {
	f := newFarm(t)
	impatient := f.broker.ClientWith(t, broker.Config{AckWait: 300 * time.Millisecond})
	a := sh("echo run").outputs("out")
	d := f.store(a)
	name, err := impatient.Submit(t.Context(), broker.Request{Action: d})
	if err != nil {
		t.Fatal(err)
	}
	for i := range broker.MaxAttempts {
		dies := impatient.Queue(broker.WorkerInfo{Name: fmt.Sprint("dies ", i), Slots: 1}) // it does not Run, so it renews nothing
		lease, err := dies.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := lease.Begin(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	f.worker("auto", nil)
	r := f.wait(name)
	if statusCode(r) != code.Code_UNAVAILABLE || r.GetResult() != nil {
		t.Errorf("response is %v", r)
	}
	if _, err := f.cache.Get(t.Context(), d); err == nil {
		t.Error("it was run and is cached")
	}
}
