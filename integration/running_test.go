package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// text returns a blob as text.
func (c *client) text(t testing.TB, d *repb.Digest) string {
	t.Helper()
	if d.GetSizeBytes() == 0 {
		return ""
	}
	data, err := c.get(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// ok runs a job that must succeed and returns its result and standard output.
func (c *client) ok(t testing.TB, j *job) (*repb.ActionResult, string) {
	t.Helper()
	response := c.run(t, j)
	result := response.GetResult()
	if response.GetStatus().GetCode() != 0 || result.GetExitCode() != 0 {
		t.Fatalf("response %v, standard error %q", response, c.text(t, result.GetStderrDigest()))
	}
	return result, c.text(t, result.GetStdoutDigest())
}

// cached returns the result of an action in the action cache, nil for none.
func (c *client) cached(t testing.TB, action *repb.Digest) *repb.ActionResult {
	t.Helper()
	result, err := c.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: action})
	if err != nil && status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
	return result
}

// An action finds what its client described, and its client gets what it made.
func TestRunning(t *testing.T) {
	t.Setenv("JETFARM_TEST_SECRET", "secret of the worker")
	f := &allInOne{data: dataDir(t), flags: []string{"--default-timeout", "3s", "--max-timeout", "1h"}}
	f.start(t)
	c := dial(t, f.endpoint(t))
	const tool = "#!/bin/sh\necho tool \"$@\"\n"
	for _, test := range []struct {
		row    string
		script string
		change func(*job)
		want   string // of standard output
	}{
		{"EXR-1 X-85 inputs are in place", `cat in sub/deep/in; ./sub/tool x; test -x in || echo plain; test -d empty/dir && ls -A empty/dir
			for l in abs up loop; do readlink $l; done`, func(j *job) {
			j.files = map[string]string{"in": "hello\n", "sub/deep/in": "deep\n", "sub/tool": tool}
			j.links = map[string]string{"abs": "/etc/nowhere", "up": "../../..", "loop": "loop"}
			j.dirs = []string{"empty/dir"}
		}, "hello\ndeep\ntool x\nplain\n/etc/nowhere\n../../..\nloop\n"},
		{"EXV-25 X-82 names that differ in case", "cat Foo foo", func(j *job) {
			j.files = map[string]string{"Foo": "upper\n", "foo": "lower\n"}
		}, "upper\nlower\n"},
		{"X-81 names that look alike", "cat *", func(j *job) {
			j.files = map[string]string{"e\u0301": "two runes\n", "\u00e9": "one rune\n"}
		}, "two runes\none rune\n"},
		{"EXV-20 sorted by bytes", "cat *", func(j *job) {
			j.files = map[string]string{"\uFFFD": "first\n", "\U0001F600": "second\n"}
		}, "first\nsecond\n"},
		{"EXR-2 working directory", "pwd | sed 's#.*/##'; cat in ../up", func(j *job) {
			j.files = map[string]string{"a/wd/in": "in\n", "a/up": "up\n"}
			j.command.WorkingDirectory = "a/wd"
		}, "wd\nin\nup\n"},
		{"EXR-3 program below the working directory", "", func(j *job) {
			j.files = map[string]string{"wd/bin/tool": tool}
			j.command.WorkingDirectory, j.command.Arguments = "wd", []string{"bin/tool", "a"}
		}, "tool a\n"},
		{"EXR-3 program on a PATH that is relative", "", func(j *job) {
			j.files = map[string]string{"wd/bin/tool": tool}
			j.command.WorkingDirectory, j.command.Arguments = "wd", []string{"tool", "b"}
			j.command.EnvironmentVariables[0].Value = "bin"
		}, "tool b\n"},
		{"EXR-3 program on a PATH", "", func(j *job) { j.command.Arguments = []string{"echo", "c"} }, "c\n"},
		{"EXR-3 absolute program", "", func(j *job) { j.command.Arguments = []string{"/bin/echo", "d"} }, "d\n"},
		{"EXR-4 X-139 environment", "env | grep -v '^PWD=\\|^_=\\|^SHLVL=' | sort", func(j *job) {
			j.command.EnvironmentVariables = append(j.command.EnvironmentVariables, &repb.Command_EnvironmentVariable{Name: "LD_LIBRARY_PATH", Value: "/x"})
		}, "LD_LIBRARY_PATH=/x\nPATH=/usr/bin:/bin\n"},
		{"EXR-5 parents of outputs", "ls -d x/y d 2>&1; test -e x/y/z || echo no z; test -e d/e || echo no e", func(j *job) {
			j.command.OutputPaths = []string{"d/e", "x/y/z"}
		}, "d\nx/y\nno z\nno e\n"},
		{"EXR-11 X-143 standard input", "cat; echo end", nil, "end\n"},
		{"EXV-12 D16 nested outputs and beside", "mkdir -p ../out/in; echo made", func(j *job) {
			j.dirs, j.command.WorkingDirectory, j.command.OutputPaths = []string{"wd"}, "wd", []string{"../out", "../out/in"}
		}, "made\n"},
		{"EXV-5 variables of the loader reach the action only", "echo $LD_PRELOAD", func(j *job) {
			j.command.EnvironmentVariables = append([]*repb.Command_EnvironmentVariable{{Name: "LD_PRELOAD", Value: ""}}, j.command.EnvironmentVariables...)
		}, "\n"},
		{"EXA-19 a timeout of zero", "echo made", func(j *job) { j.action.Timeout = durationpb.New(0) }, "made\n"},
	} {
		t.Run(test.row, func(t *testing.T) {
			j := script(test.script)
			if test.change != nil {
				test.change(j)
			}
			if _, got := c.ok(t, j); got != test.want {
				t.Errorf("standard output %q, want %q", got, test.want)
			}
		})
	}
	t.Run("EXR-8 EXR-10 a failure has its exit code and outputs", func(t *testing.T) {
		response := c.run(t, script("echo made > out; exit 7", "out"))
		if response.GetStatus().GetCode() != 0 || response.GetResult().GetExitCode() != 7 || len(response.GetResult().GetOutputFiles()) != 1 {
			t.Errorf("response %v", response)
		}
	})
	t.Run("EXR-8 killed by a signal", func(t *testing.T) {
		if response := c.run(t, script("kill -9 $$")); response.GetStatus().GetCode() != 0 || response.GetResult().GetExitCode() != 137 {
			t.Errorf("response %v", response)
		}
	})
	t.Run("EXR-9 a failure is not cached", func(t *testing.T) {
		j := script("cat /proc/sys/kernel/random/uuid; exit 1")
		one := c.run(t, j).GetResult().GetStdoutDigest().GetHash()
		if two := c.run(t, j).GetResult().GetStdoutDigest().GetHash(); one == two {
			t.Error("the second run has the output of the first")
		}
	})
	t.Run("EXA-18 a default timeout", func(t *testing.T) {
		j := script("echo begun; sleep 60")
		response := c.run(t, j)
		if codes.Code(response.GetStatus().GetCode()) != codes.DeadlineExceeded || c.text(t, response.GetResult().GetStdoutDigest()) != "begun\n" {
			t.Errorf("response %v", response)
		}
	})
	t.Run("EXR-7 X-122 X-123 X-147 a timeout ends everything", func(t *testing.T) {
		marker := fmt.Sprintf("%d.25", 100_000+os.Getpid())
		j := script("echo partial; echo half > out; trap '' TERM; (setsid sleep "+marker+" &); sleep "+marker+" & kill -STOP $$", "out")
		j.action.Timeout = durationpb.New(500 * time.Millisecond)
		a := j.make(t)
		response := c.run(t, j)
		if s := response.GetStatus(); codes.Code(s.GetCode()) != codes.DeadlineExceeded || s.GetMessage() != "execution timeout exceeded" {
			t.Errorf("status %v", s)
		}
		result := response.GetResult()
		if result.GetExitCode() == 0 || c.text(t, result.GetStdoutDigest()) != "partial\n" || len(result.GetOutputFiles()) != 1 {
			t.Errorf("result %v", result)
		}
		if n := len(sleepers(t, marker)); n != 0 {
			t.Errorf("%d processes are left", n)
		}
		if c.cached(t, a.digest) != nil {
			t.Error("the result is cached")
		}
	})
	if os.Geteuid() == 0 { // else actions have no /tmp of their own
		t.Run("EXR-13 X-138 nothing is left for the next action", func(t *testing.T) {
			c.ok(t, script("echo secret > /tmp/left; echo secret > left; echo secret > ../left || true"))
			if _, got := c.ok(t, script("cat /tmp/left left ../left 2>/dev/null; ls -A /tmp | grep left; true")); got != "" {
				t.Errorf("the next action finds %q", got)
			}
		})
	}
	t.Run("EXR-12 inputs are the same for the next action", func(t *testing.T) {
		const original = "#!/bin/sh\necho original\n"
		for _, text := range []string{
			"chmod 777 in; echo evil > in", "rm -f in; echo evil > in", "ln in y; chmod 777 y; echo evil >> y", "truncate -s 1 in", "chmod 6755 in; true",
		} {
			j := script("("+text+") 2>/dev/null; true", "in")
			j.files = map[string]string{"in": original}
			c.run(t, j)
			j = script("./in; cat in; stat -c %A in | cut -c4 # after " + text)
			j.files = map[string]string{"in": original}
			if _, got := c.ok(t, j); got != "original\n"+original+"x\n" {
				t.Errorf("after %q the next action gets %q", text, got)
			}
		}
	})
	t.Run("EXV-13 output_paths replaces the older fields", func(t *testing.T) {
		j := script("touch a b", "a")
		j.command.OutputFiles, j.command.OutputDirectories = []string{"b", "/malformed/"}, []string{"//"} //nolint:staticcheck // REAPI 2.0
		if result, _ := c.ok(t, j); len(result.GetOutputFiles()) != 1 || result.GetOutputFiles()[0].GetPath() != "a" {
			t.Errorf("result %v", result)
		}
	})
	t.Run("EXV-17 an unknown directory format", func(t *testing.T) {
		j := script("mkdir d", "d")
		j.command.OutputDirectoryFormat = 9
		if result, _ := c.ok(t, j); len(result.GetOutputDirectories()) != 1 || result.GetOutputDirectories()[0].GetTreeDigest() == nil {
			t.Errorf("result %v", result)
		}
	})
	t.Run("EXV-8 the working directory as output", func(t *testing.T) {
		j := script("touch made", "")
		j.files = map[string]string{"in": "x"}
		if result, _ := c.ok(t, j); len(result.GetOutputDirectories()) != 1 || result.GetOutputDirectories()[0].GetPath() != "" {
			t.Errorf("result %v", result)
		}
	})
	t.Run("EXV-21 node properties of inputs", func(t *testing.T) {
		j := script("cat in")
		j.root = &repb.Directory{Files: []*repb.FileNode{{
			Name: "in", Digest: j.blob([]byte("x")),
			NodeProperties: &repb.NodeProperties{Properties: []*repb.NodeProperty{{Name: "unknown", Value: "1"}}},
		}}}
		if _, got := c.ok(t, j); got != "x" {
			t.Errorf("standard output %q", got)
		}
	})
	t.Run("EXV-28 unknown fields", func(t *testing.T) {
		j := script("echo made")
		field := protowire.AppendString(protowire.AppendTag(nil, 99, protowire.BytesType), "of tomorrow")
		with := func(m proto.Message) []byte {
			data, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			return append(data, field...)
		}
		j.action.InputRootDigest, j.action.CommandDigest = j.blob(with(&repb.Directory{})), j.blob(with(j.command))
		whole := with(&repb.Action{CommandDigest: j.action.GetCommandDigest(), InputRootDigest: j.action.GetInputRootDigest()})
		if err := c.put(t.Context(), append(j.blobs, whole)...); err != nil {
			t.Fatal(err)
		}
		response, err := c.execute(t.Context(), digestOf(whole))
		if err != nil || checkRan(response) != nil {
			t.Errorf("Execute = %v, %v", response, err)
		}
	})
	t.Run("EXA-32 a salt makes another action", func(t *testing.T) {
		run := func(salt string) string {
			j := script("cat /proc/sys/kernel/random/uuid")
			j.action.Salt = []byte(salt)
			_, out := c.ok(t, j)
			return out
		}
		if one, two, again := run("one"), run("two"), run("one"); one == two || again != one {
			t.Errorf("outputs %q, %q and %q", one, two, again)
		}
	})
	t.Run("EXA-30 GEN-16 everything is of the digest function of the request", func(t *testing.T) { checkFunction(t, c) })
	t.Run("ACG-13 ACG-14 EXA-31 what a result always has", func(t *testing.T) { checkResult(t, c) })
	t.Run("GEN-19 directories are encoded canonically", func(t *testing.T) { checkCanonical(t, c) })
}

// checkResult checks what clients take for granted in a result that the cache has.
func checkResult(t *testing.T, c *client) {
	t.Helper()
	begun := time.Now()
	j := script("echo out; mkdir d; echo x > d/f; echo f > f", "d", "f")
	a := j.make(t)
	c.ok(t, j)
	result, err := c.actions.GetActionResult(t.Context(), &repb.GetActionResultRequest{ActionDigest: a.digest, InlineStdout: true})
	if err != nil || string(result.GetStdoutRaw()) != "out\n" {
		t.Fatalf("GetActionResult = %v, %v", result, err)
	}
	if len(result.GetOutputFiles()) != 1 || len(result.GetOutputDirectories()) != 1 {
		t.Fatalf("result %v", result)
	}
	if result.GetOutputFiles()[0].GetDigest() == nil || result.GetOutputDirectories()[0].GetTreeDigest() == nil {
		t.Errorf("an output has no digest: %v", result)
	}
	m := result.GetExecutionMetadata()
	if m.GetWorker() == "" {
		t.Errorf("no worker in %v", m)
	}
	last := begun.Add(-time.Second)
	for i, at := range []*timestamppb.Timestamp{
		m.GetQueuedTimestamp(), m.GetWorkerStartTimestamp(), m.GetInputFetchStartTimestamp(), m.GetInputFetchCompletedTimestamp(),
		m.GetExecutionStartTimestamp(), m.GetExecutionCompletedTimestamp(), m.GetOutputUploadStartTimestamp(),
		m.GetOutputUploadCompletedTimestamp(), m.GetWorkerCompletedTimestamp(),
	} {
		if !at.IsValid() || at.AsTime().Before(last) {
			t.Errorf("timestamp %d is %v after %v", i, at.AsTime(), last)
		}
		last = at.AsTime()
	}
}

// checkFunction runs an action whose digests are those of BLAKE3.
func checkFunction(t *testing.T, c *client) {
	t.Helper()
	space, err := digest.SpaceOf("", repb.DigestFunction_BLAKE3, "")
	if err != nil {
		t.Fatal(err)
	}
	put := func(m proto.Message) *repb.Digest {
		data, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d := space.Of(data).Proto()
		response, err := c.blobs.BatchUpdateBlobs(t.Context(), &repb.BatchUpdateBlobsRequest{
			DigestFunction: repb.DigestFunction_BLAKE3, Requests: []*repb.BatchUpdateBlobsRequest_Request{{Digest: d, Data: data}},
		})
		if err != nil || response.GetResponses()[0].GetStatus().GetCode() != 0 {
			t.Fatalf("BatchUpdateBlobs = %v, %v", response, err)
		}
		return d
	}
	j := script("mkdir d; printf made > d/f; printf made > f; printf made", "d", "f")
	action := put(&repb.Action{CommandDigest: put(j.command), InputRootDigest: put(&repb.Directory{})})
	stream, err := c.runs.Execute(t.Context(), &repb.ExecuteRequest{ActionDigest: action, DigestFunction: repb.DigestFunction_BLAKE3})
	if err != nil {
		t.Fatal(err)
	}
	response, err := result(stream)
	if err != nil || checkRan(response) != nil {
		t.Fatalf("Execute = %v, %v", response, err)
	}
	made, r := space.Of([]byte("made")).Proto(), response.GetResult()
	if !proto.Equal(r.GetOutputFiles()[0].GetDigest(), made) || !proto.Equal(r.GetStdoutDigest(), made) {
		t.Errorf("result %v, want the digest %v", r, made)
	}
	tree := r.GetOutputDirectories()[0].GetTreeDigest()
	read, err := c.blobs.BatchReadBlobs(t.Context(), &repb.BatchReadBlobsRequest{Digests: []*repb.Digest{tree}, DigestFunction: repb.DigestFunction_BLAKE3})
	if err != nil || !proto.Equal(space.Of(read.GetResponses()[0].GetData()).Proto(), tree) {
		t.Errorf("BatchReadBlobs = %v, %v", read, err)
	}
}

// checkCanonical checks that a Tree and its Directories are what anybody makes of the same files.
func checkCanonical(t *testing.T, c *client) {
	t.Helper()
	made := func(salt, text string) *repb.OutputDirectory {
		j := script(text, "out")
		j.action.Salt = []byte(salt)
		j.command.OutputDirectoryFormat = repb.Command_TREE_AND_DIRECTORY
		result, _ := c.ok(t, j)
		return result.GetOutputDirectories()[0]
	}
	one := made("canonical 1", "mkdir -p out/b out/a/x out/Z; echo 1 > out/b/f; echo 2 > out/a/x/f; ln -s t out/l; echo 3 > out/c; : > out/B")
	two := made("canonical 2", "mkdir -p out; : > out/B; ln -s t out/l; mkdir out/Z out/b out/a out/a/x; echo 3 > out/c; echo 2 > out/a/x/f; echo 1 > out/b/f")
	if !proto.Equal(one, two) {
		t.Errorf("the same files are %v and %v", one, two)
	}
	again := func(d *repb.Digest, m proto.Message) []byte {
		data, err := c.get(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if err := proto.Unmarshal(data, m); err != nil {
			t.Fatal(err)
		}
		encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil || !bytes.Equal(encoded, data) {
			t.Errorf("%T is not encoded canonically: %x, want %x", m, data, encoded)
		}
		return encoded
	}
	tree, root := new(repb.Tree), new(repb.Directory)
	again(one.GetTreeDigest(), tree)
	again(one.GetRootDirectoryDigest(), root)
	if !proto.Equal(tree.GetRoot(), root) {
		t.Errorf("the root of the tree is %v, the directory %v", tree.GetRoot(), root)
	}
	var names []string
	for _, f := range root.GetFiles() {
		names = append(names, f.GetName())
	}
	for _, d := range root.GetDirectories() {
		names = append(names, d.GetName())
		again(d.GetDigest(), new(repb.Directory))
	}
	if got := strings.Join(names, " "); got != "B c Z a b" {
		t.Errorf("names %q, want them sorted by bytes", got)
	}
}

// Time that the client does not control is not in its timeout: the action waits for the slot that others
// have for longer than it may take.
func TestEXR_6_EXR_17_TimeoutIsOfTheExecution(t *testing.T) {
	c := dial(t, startUp(t).endpoint(t))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for i := range slots {
		a := shell(t, fmt.Sprint("in the way ", i), "sleep 2")
		if err := c.put(ctx, a.blobs...); err != nil {
			t.Fatal(err)
		}
		stream, err := c.runs.Execute(ctx, &repb.ExecuteRequest{ActionDigest: a.digest})
		if err != nil {
			t.Fatal(err)
		}
		awaitStage(t, stream, repb.ExecutionStage_EXECUTING)
	}
	j := script("echo made")
	j.action.Timeout = durationpb.New(time.Second)
	if _, got := c.ok(t, j); got != "made\n" {
		t.Errorf("standard output %q", got)
	}
}
