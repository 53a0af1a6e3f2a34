package integration_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// A job is an action while a test makes it. What refers to other blobs is set by make, unless it is set.
type job struct {
	files   map[string]string // content by path; one that begins with "#!" is executable
	links   map[string]string // targets by path
	dirs    []string          // empty directories
	root    *repb.Directory   // in place of the three
	command *repb.Command
	action  *repb.Action
	blobs   [][]byte
}

func script(text string, outputs ...string) *job {
	return &job{
		command: &repb.Command{
			Arguments: []string{"/bin/sh", "-c", text}, OutputPaths: outputs,
			EnvironmentVariables: []*repb.Command_EnvironmentVariable{{Name: "PATH", Value: "/usr/bin:/bin"}},
		},
		action: &repb.Action{},
	}
}

// blob adds a blob that is uploaded with the job.
func (j *job) blob(data []byte) *repb.Digest {
	j.blobs = append(j.blobs, data)
	return digestOf(data)
}

func (j *job) message(t testing.TB, m proto.Message) *repb.Digest {
	t.Helper()
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return j.blob(data)
}

// make adds the action with all it needs. Actions of different tests are different by their salt.
func (j *job) make(t testing.TB) *action {
	t.Helper()
	if j.action.GetInputRootDigest() == nil {
		if j.root == nil {
			j.root = j.directory(t, "")
		}
		j.action.InputRootDigest = j.message(t, j.root)
	}
	if j.action.GetCommandDigest() == nil {
		j.action.CommandDigest = j.message(t, j.command)
	}
	if j.action.GetSalt() == nil {
		j.action.Salt = []byte(t.Name())
	}
	return &action{digest: j.message(t, j.action), blobs: j.blobs}
}

// directory makes the Directory at a prefix, which is "" or ends in a slash.
func (j *job) directory(t testing.TB, prefix string) *repb.Directory {
	t.Helper()
	d, below := &repb.Directory{}, map[string]bool{}
	child := func(path string, leaf func(name string)) {
		rest, inside := strings.CutPrefix(path, prefix)
		if !inside {
			return
		}
		if dir, _, deeper := strings.Cut(rest, "/"); deeper {
			below[dir] = true
		} else {
			leaf(rest)
		}
	}
	for _, path := range sortedKeys(j.files) {
		child(path, func(name string) {
			content := j.files[path]
			d.Files = append(d.Files, &repb.FileNode{Name: name, Digest: j.blob([]byte(content)), IsExecutable: strings.HasPrefix(content, "#!")})
		})
	}
	for _, path := range sortedKeys(j.links) {
		child(path, func(name string) {
			d.Symlinks = append(d.Symlinks, &repb.SymlinkNode{Name: name, Target: j.links[path]})
		})
	}
	for _, path := range j.dirs {
		child(path, func(name string) { below[name] = true })
	}
	for _, name := range sortedKeys(below) {
		d.Directories = append(d.Directories, &repb.DirectoryNode{Name: name, Digest: j.message(t, j.directory(t, prefix+name+"/"))})
	}
	return d
}

// run uploads a job and executes it.
func (c *client) run(t testing.TB, j *job) *repb.ExecuteResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a := j.make(t)
	if err := c.put(ctx, a.blobs...); err != nil {
		t.Fatal(err)
	}
	response, err := c.execute(ctx, a.digest)
	if err != nil {
		t.Fatal(err)
	}
	return response
}

// wantRefused fails the test unless a job was refused in its response, in words that name the cause, and
// without what would make its client try again.
func wantRefused(t testing.TB, response *repb.ExecuteResponse, code codes.Code, texts ...string) {
	t.Helper()
	s := response.GetStatus()
	if codes.Code(s.GetCode()) != code || len(s.GetDetails()) != 0 {
		t.Fatalf("response %v, want %v without details", response, code)
	}
	for _, text := range texts {
		if !strings.Contains(s.GetMessage(), text) {
			t.Errorf("%q does not say %q", s.GetMessage(), text)
		}
	}
}

// What cannot be executed is refused with INVALID_ARGUMENT and words that name what is wrong; the farm
// executes what comes after it.
func TestActionsAreRefused(t *testing.T) {
	f := &allInOne{data: dataDir(t), flags: []string{"--max-timeout", "1h"}}
	f.start(t)
	c := dial(t, f.endpoint(t))
	file := func(name string) *repb.FileNode { return &repb.FileNode{Name: name, Digest: digestOf([]byte("x"))} }
	root := func(d *repb.Directory) func(*job) {
		return func(j *job) { j.blob([]byte("x")); j.root = d }
	}
	names := func(names ...string) func(*job) {
		d := &repb.Directory{}
		for _, name := range names {
			d.Files = append(d.Files, file(name))
		}
		return root(d)
	}
	link := func(target string) func(*job) {
		return root(&repb.Directory{Symlinks: []*repb.SymlinkNode{{Name: "l", Target: target}}})
	}
	outputs := func(paths ...string) func(*job) { return func(j *job) { j.command.OutputPaths = paths } }
	files := func(paths ...string) func(*job) {
		return func(j *job) { j.command.OutputPaths, j.command.OutputFiles = nil, paths } //nolint:staticcheck // REAPI 2.0
	}
	args := func(args ...string) func(*job) { return func(j *job) { j.command.Arguments = args } }
	env := func(name, value string) func(*job) {
		return func(j *job) {
			j.command.EnvironmentVariables = append(j.command.EnvironmentVariables, &repb.Command_EnvironmentVariable{Name: name, Value: value})
		}
	}
	wd := func(dir string) func(*job) {
		return func(j *job) {
			j.files, j.links = map[string]string{"file": "x", "dir/in": "x"}, map[string]string{"link": "dir"}
			j.command.WorkingDirectory = dir
		}
	}
	timeout := func(d *durationpb.Duration) func(*job) { return func(j *job) { j.action.Timeout = d } }
	for _, test := range []struct {
		row, text string
		change    func(*job)
	}{
		{"EXV-1 X-91 action of text", "Action", func(j *job) { j.action = nil }},
		{"EXV-1 command of text", "Command", func(j *job) { j.action.CommandDigest = j.blob([]byte("\xff\xff")) }},
		{"EXV-2 no command", "command_digest", func(j *job) { j.action.CommandDigest = &repb.Digest{} }},
		{"EXV-2 malformed root", "input_root_digest", func(j *job) { j.action.InputRootDigest = &repb.Digest{Hash: "zz", SizeBytes: 1} }},
		{"EXV-2 negative size", "input_root_digest", func(j *job) {
			j.action.InputRootDigest = &repb.Digest{Hash: digestOf(nil).GetHash(), SizeBytes: -1}
		}},
		{"EXV-3 X-92 empty command", "no arguments", func(j *job) { j.command = &repb.Command{} }},
		{"EXV-3 X-92 empty program", "no arguments", args("")},
		{"EXV-4 X-93 NUL in an argument", "NUL", args("/bin/true", "a\x00b")},
		{"EXV-29 X-93 a megabyte of argument", "argument list too long", args("/bin/true", strings.Repeat("x", 1<<20))},
		{"EXV-29 X-93 very many arguments", "argument list too long", args(append([]string{"/bin/true"}, make([]string, 400_000)...)...)},
		{"EXV-5 X-94 no name", "environment variable", env("", "x")},
		{"EXV-5 X-94 equals sign", "A=B", env("A=B", "x")},
		{"EXV-5 X-94 NUL in a name", "environment variable", env("A\x00", "x")},
		{"EXV-4 X-94 NUL in a value", "NUL", env("A", "\x00")},
		{"EXV-5 X-94 twice", "twice", env("PATH", "x")},
		{"EXV-6 X-96 absolute output", "absolute", outputs("/etc/x")},
		{"EXV-7 X-96 slash at the end", "slash", outputs("a/")},
		{"EXV-8 X-96 empty output file", "empty", files("")},
		{"EXV-9 X-96 output outside", "leaves the input root", outputs("../../x")},
		{"EXV-10 X-96 dot", `"."`, outputs("./a")},
		{"EXV-10 X-96 two slashes", "empty segment", outputs("a//b")},
		{"EXV-10 X-96 NUL", "NUL", outputs("a\x00b")},
		{"EXV-10 X-96 long segment", "255", outputs(strings.Repeat("a", 256))},
		{"EXV-10 X-96 long path", "4096", outputs(strings.Repeat("a/", 2100) + "b")},
		{"EXV-11 output file twice", "twice", files("a", "a")},
		{"EXV-11 output file below another", "below the output file", files("a", "a/b")},
		{"EXV-14 X-95 no such working directory", "working directory", wd("nope")},
		{"EXV-14 X-95 working directory is a file", "working directory", wd("file")},
		{"EXV-14 X-95 working directory is a symlink", "working directory", wd("link")},
		{"EXV-15 X-95 absolute working directory", "absolute", wd("/")},
		{"EXV-15 X-95 working directory ends in a slash", "slash", wd("dir/")},
		{"EXV-15 X-95 working directory outside", "leaves", wd("../x")},
		{"EXV-16 node property", "output_node_properties", func(j *job) { j.command.OutputNodeProperties = []string{"bogus"} }},
		{"EXV-18 X-79 empty name", "name of an entry", names("")},
		{"EXV-18 X-79 dot", "directory blobs/", names(".")},
		{"EXV-18 X-79 two dots", "directory blobs/", names("..")},
		{"EXV-18 X-79 slash", "slash or NUL", names("a/b")},
		{"EXV-18 X-79 leading slash", "slash or NUL", names("/a")},
		{"EXV-18 X-79 NUL", "slash or NUL", names("a\x00")},
		{"EXV-18 X-79 long name", "255", names(strings.Repeat("n", 256))},
		{"X-80 name that is not UTF-8", "blobs/", func(j *job) {
			node := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "a\xffb")
			j.action.InputRootDigest = j.blob(protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), node))
		}},
		{"EXV-19 X-83 file twice", "two entries", names("a", "a")},
		{"EXV-19 X-83 file and symlink", "two entries", root(&repb.Directory{
			Files: []*repb.FileNode{file("a")}, Symlinks: []*repb.SymlinkNode{{Name: "a", Target: "b"}},
		})},
		{"EXV-19 X-83 file and directory", "two entries", func(j *job) {
			j.root = &repb.Directory{
				Files:       []*repb.FileNode{{Name: "a", Digest: j.blob([]byte("x"))}},
				Directories: []*repb.DirectoryNode{{Name: "a", Digest: j.message(t, &repb.Directory{})}},
			}
		}},
		{"EXV-20 X-84 not sorted", "not sorted", names("b", "a")},
		{"EXV-20 X-84 sorted by UTF-16", "not sorted", names("\U0001F600", "\uFFFD")},
		{"EXV-22 no digest", "digest", root(&repb.Directory{Files: []*repb.FileNode{{Name: "a"}}})},
		{"EXV-22 negative size", "digest", root(&repb.Directory{Files: []*repb.FileNode{
			{Name: "a", Digest: &repb.Digest{Hash: digestOf(nil).GetHash(), SizeBytes: -1}},
		}})},
		{"EXV-23 directory of text", "not a Directory", func(j *job) {
			j.root = &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: j.blob([]byte("\xff text"))}}}
		}},
		{"EXV-24 symlink to nothing", "target is empty", link("")},
		{"EXV-24 NUL in a target", "NUL", link("a\x00")},
		{"EXV-26 X-88 inputs of a petabyte", "input root exceeds", root(&repb.Directory{Files: []*repb.FileNode{
			{Name: "a", Digest: &repb.Digest{Hash: digestOf([]byte("x")).GetHash(), SizeBytes: 1 << 50}},
		}})},
		{"EXV-26 X-74 inputs too deep", "input root exceeds", func(j *job) {
			j.root = &repb.Directory{}
			for range 2000 {
				j.root = &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: j.message(t, j.root)}}}
			}
		}},
		{"EXV-26 X-75 inputs of exponentially many paths", "input root exceeds", func(j *job) {
			j.root = &repb.Directory{}
			for range 60 {
				d := j.message(t, j.root)
				j.root = &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "a", Digest: d}, {Name: "b", Digest: d}}}
			}
		}},
		{"EXV-27 X-98 output below an input file", `because "a"`, func(j *job) {
			j.files, j.command.OutputPaths = map[string]string{"a": "x"}, []string{"a/b"}
		}},
		{"X-98 X-86 output below an input symlink", `because "a"`, func(j *job) {
			j.links, j.command.OutputPaths = map[string]string{"a": "/etc"}, []string{"a/passwd"}
		}},
		{"EXA-17 timeout above the maximum", "1h0m0s", timeout(durationpb.New(2 * time.Hour))},
		{"EXA-17 X-99 timeout of ages", "maximum", timeout(&durationpb.Duration{Seconds: 300_000_000_000})},
		{"EXA-19 X-99 negative timeout", "timeout -1s", timeout(durationpb.New(-time.Second))},
		{"EXA-19 X-99 odd timeout", "timeout", timeout(&durationpb.Duration{Seconds: 1, Nanos: -1})},
		{"EXR-14 X-145 no such program", `"nope"`, args("nope")},
		{"EXR-14 X-145 no such file", `"/nope/x"`, args("/nope/x")},
		{"EXR-14 X-145 program is a directory", `"/etc"`, args("/etc")},
		{"EXR-14 X-145 program is not executable", `"./in"`, func(j *job) {
			j.files, j.command.Arguments = map[string]string{"in": "text"}, []string{"./in"}
		}},
		{"EXR-14 X-145 no such interpreter", "in", func(j *job) {
			j.files, j.command.Arguments = map[string]string{"in": "#!/no/such/interpreter\n"}, []string{"./in"}
		}},
		{"EXR-14 X-145 program of another format", "in", func(j *job) {
			j.files, j.command.Arguments = map[string]string{"in": "#!\x7f\x00\x01"}, []string{"./in"}
		}},
	} {
		t.Run(test.row, func(t *testing.T) {
			j := script("true")
			test.change(j)
			if j.action == nil {
				text := []byte("no action at all")
				if err := c.put(t.Context(), text); err != nil {
					t.Fatal(err)
				}
				response, err := c.execute(t.Context(), digestOf(text))
				if err != nil {
					t.Fatal(err)
				}
				wantRefused(t, response, codes.InvalidArgument, test.text)
				return
			}
			wantRefused(t, c.run(t, j), codes.InvalidArgument, test.text)
		})
	}
	t.Run("X-97 very many outputs", func(t *testing.T) {
		j := script("true")
		for i := range 200_001 {
			j.command.OutputPaths = append(j.command.OutputPaths, fmt.Sprint("out/", i))
		}
		a := j.make(t)
		for _, blob := range a.blobs {
			if err := c.write(t.Context(), digestOf(blob), blob); err != nil {
				t.Fatal(err)
			}
		}
		response, err := c.execute(t.Context(), a.digest)
		if err != nil || proto.Size(response) > 4<<20 {
			t.Fatalf("Execute = %d bytes, %v", proto.Size(response), err)
		}
		wantRefused(t, response, codes.InvalidArgument, "output")
	})
	if err := checkRan(c.run(t, script("true"))); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// Whatever an action lacks is listed, each blob once, as clients need it to upload it.
func TestMissingInputsAreListed(t *testing.T) {
	c := dial(t, startUp(t).endpoint(t))
	gone := func(name string) *repb.Digest { return digestOf([]byte("gone: " + name)) }
	name := func(d *repb.Digest) string { return fmt.Sprintf("blobs/%s/%d", d.GetHash(), d.GetSizeBytes()) }
	for _, test := range []struct {
		row     string
		change  func(*job)
		missing []*repb.Digest
	}{
		{"EXA-7 EXA-8 EXA-9 EXA-11 a file, twice", func(j *job) {
			j.root = &repb.Directory{Files: []*repb.FileNode{{Name: "a", Digest: gone("f")}, {Name: "b", Digest: gone("f")}}}
		}, []*repb.Digest{gone("f")}},
		{"EXA-7 EXA-9 directory and file", func(j *job) {
			j.root = &repb.Directory{
				Files:       []*repb.FileNode{{Name: "a", Digest: gone("f")}},
				Directories: []*repb.DirectoryNode{{Name: "d", Digest: gone("d")}},
			}
		}, []*repb.Digest{gone("d"), gone("f")}},
		{"EXA-6 EXA-7 command and input root", func(j *job) {
			j.action.CommandDigest, j.action.InputRootDigest = gone("c"), gone("r")
		}, []*repb.Digest{gone("c"), gone("r")}},
		{"EXA-7 input root", func(j *job) { j.action.InputRootDigest = gone("r") }, []*repb.Digest{gone("r")}},
		{"X-87 a size that lies", func(j *job) {
			lie := &repb.Digest{Hash: j.blob([]byte("here")).GetHash(), SizeBytes: 1}
			j.root = &repb.Directory{Files: []*repb.FileNode{{Name: "a", Digest: lie}}}
		}, []*repb.Digest{{Hash: digestOf([]byte("here")).GetHash(), SizeBytes: 1}}},
	} {
		t.Run(test.row, func(t *testing.T) {
			j := script("true")
			test.change(j)
			s := c.run(t, j).GetStatus()
			if codes.Code(s.GetCode()) != codes.FailedPrecondition || len(s.GetDetails()) != 1 {
				t.Fatalf("status %v, want FAILED_PRECONDITION with one detail", s)
			}
			failure := new(errdetails.PreconditionFailure)
			if err := s.GetDetails()[0].UnmarshalTo(failure); err != nil {
				t.Fatal(err)
			}
			listed := map[string]int{}
			for _, v := range failure.GetViolations() {
				listed[v.GetType()+" "+v.GetSubject()]++
			}
			for _, d := range test.missing {
				if listed["MISSING "+name(d)] != 1 || len(listed) != len(test.missing) {
					t.Errorf("violations %v, want each of %v once", listed, test.missing)
				}
			}
		})
	}
	t.Run("EXA-10 more than a message has room for", func(t *testing.T) {
		j := script("true")
		for i := range 20 {
			d := &repb.Directory{}
			for k := range 1000 {
				d.Files = append(d.Files, &repb.FileNode{Name: fmt.Sprintf("%05d", k), Digest: gone(fmt.Sprint(i, k))})
			}
			if j.root == nil {
				j.root = &repb.Directory{}
			}
			j.root.Directories = append(j.root.Directories, &repb.DirectoryNode{Name: fmt.Sprintf("%02d", i), Digest: j.message(t, d)})
		}
		response := c.run(t, j)
		if codes.Code(response.GetStatus().GetCode()) != codes.FailedPrecondition || len(response.GetStatus().GetDetails()) != 1 || proto.Size(response) >= 4<<20 {
			t.Errorf("status %v and %d bytes, want one detail of less than 4 MiB", response.GetStatus().GetCode(), proto.Size(response))
		}
	})
}
