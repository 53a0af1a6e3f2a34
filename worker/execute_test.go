package worker_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/actioncache"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/worker"
)

func sleepMarker() string {
	return fmt.Sprintf("%d.%d", 80000+os.Getpid()%10000, time.Now().UnixNano())
}

func TestActionRunsOnItsInputs(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		w := f.worker(isolation, nil)
		if w.Isolation() != isolation {
			t.Fatalf("isolation is %s", w.Isolation())
		}
		a := sh(`set -e
			cat in.txt sub/deep/in.txt > out.txt; ./sub/tool >> out.txt; readlink link >> out.txt
			test -d empty; test ! -x in.txt; mkdir -p dir/a; echo nested > dir/a/f; ln -s ../x dir/l; mkdir dir/none
			ln -s out.txt sym; cp sub/tool exe; chmod 755 exe; echo visible; echo warn >&2; ls -d parent/of/missing`)
		a.outputs("out.txt", "dir", "sym", "exe", "parent/of/missing/file", "nothing")
		a.files = map[string]string{"in.txt": "hello\n", "sub/deep/in.txt": "deep\n", "sub/tool": "#!/bin/sh\necho tool\n"}
		a.links = map[string]string{"link": "../../outside"}
		a.dirs = []string{"empty"}
		res := f.ok(a)
		if res.GetExitCode() != 0 {
			t.Fatalf("exit code %d, stderr %q", res.GetExitCode(), f.blob(res.GetStderrDigest()))
		}
		if got, want := f.blob(res.GetStdoutDigest()), "visible\nparent/of/missing\n"; got != want {
			t.Errorf("stdout is %q, want %q", got, want)
		}
		if got := f.blob(res.GetStderrDigest()); got != "warn\n" {
			t.Errorf("stderr is %q", got)
		}
		if len(res.GetOutputFiles()) != 2 || len(res.GetOutputDirectories()) != 1 || len(res.GetOutputSymlinks()) != 1 {
			t.Fatalf("result is %v", res)
		}
		out, exe := res.GetOutputFiles()[0], res.GetOutputFiles()[1]
		if got, want := f.blob(out.GetDigest()), "hello\ndeep\ntool\n../../outside\n"; got != want || out.GetIsExecutable() {
			t.Errorf("out.txt is %q, executable %v", got, out.GetIsExecutable())
		}
		if exe.GetPath() != "exe" || !exe.GetIsExecutable() {
			t.Errorf("exe is %v", exe)
		}
	})
}

// The digest function of the action is that of everything it produces.
func TestOutputsHaveTheDigestFunctionOfTheAction(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	for _, function := range digest.Functions() {
		t.Run(function.String(), func(t *testing.T) {
			var err error
			if f.space, err = digest.SpaceOf("main", function.Proto(), ""); err != nil {
				t.Fatal(err)
			}
			a := sh(`mkdir -p dir/sub; cp in.txt dir/sub/f; cat in.txt dir/sub/f > out.txt; cat in.txt; cat in.txt >&2`)
			a.outputs("out.txt", "dir")
			a.files = map[string]string{"in.txt": "made with " + function.String()}
			action := f.store(a)
			r := f.wait(f.submit(broker.Request{Action: action}))
			res := r.GetResult()
			if statusCode(r) != code.Code_OK || len(res.GetOutputFiles()) != 1 || len(res.GetOutputDirectories()) != 1 {
				t.Fatalf("response is %v", r)
			}
			in := a.files["in.txt"]
			if got := f.blob(res.GetOutputFiles()[0].GetDigest()) + f.blob(res.GetStdoutDigest()) + f.blob(res.GetStderrDigest()); got != in+in+in+in {
				t.Errorf("outputs are %q", got)
			}
			tree := &repb.Tree{}
			if err := proto.Unmarshal([]byte(f.blob(res.GetOutputDirectories()[0].GetTreeDigest())), tree); err != nil {
				t.Fatal(err)
			}
			if len(tree.GetChildren()) != 1 || f.blob(tree.GetChildren()[0].GetFiles()[0].GetDigest()) != in {
				t.Errorf("tree is %v", tree)
			}
			if got, err := f.cache.Get(t.Context(), action); err != nil || got == nil {
				t.Errorf("the cache has %v, %v", got, err)
			}
		})
	}
}

func TestResultEntersTheCacheOnlyWhenItMay(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	for _, c := range []struct {
		name   string
		script string
		change func(*action)
		cached bool
	}{
		{"success", "true", nil, true},
		{"failure", "exit 3", nil, false},
		{"do_not_cache", "true # uncached", func(a *action) { a.action.DoNotCache = true }, false},
		{"timeout", "sleep 60", func(a *action) { a.action.Timeout = durationpb.New(100 * time.Millisecond) }, false},
	} {
		a := sh(c.script)
		if c.change != nil {
			c.change(a)
		}
		f.run(a)
		_, err := f.cache.Get(t.Context(), f.store(a))
		if cached := err == nil; cached != c.cached || err != nil && !errors.Is(err, actioncache.ErrNotFound) {
			t.Errorf("%s: cached is %v (%v)", c.name, cached, err)
		}
	}
}

func TestSkipCacheLookupOverwrites(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	a := sh("date +%N")
	d := f.store(a)
	first := f.wait(f.submit(broker.Request{Action: d})).GetResult().GetStdoutDigest().GetHash()
	second := f.wait(f.submit(broker.Request{Action: d, SkipCacheLookup: true})).GetResult().GetStdoutDigest().GetHash()
	held, err := f.cache.Get(t.Context(), d)
	if err != nil || first == second || held.GetStdoutDigest().GetHash() != second {
		t.Errorf("cache has %v (%v) after %s and %s", held.GetStdoutDigest(), err, first, second)
	}
}

func TestExitCodeOutputsAndMetadata(t *testing.T) {
	f := newFarm(t)
	w := f.worker("auto", nil)
	begun := time.Now()
	res := f.ok(sh("echo made > out; sleep 0.3; exit 7").outputs("out"))
	if res.GetExitCode() != 7 || len(res.GetOutputFiles()) != 1 {
		t.Errorf("result is %v", res)
	}
	m := res.GetExecutionMetadata()
	last := timestamppb.New(begun.Add(-time.Second))
	for i, at := range []*timestamppb.Timestamp{
		m.GetQueuedTimestamp(), m.GetWorkerStartTimestamp(), m.GetInputFetchStartTimestamp(), m.GetInputFetchCompletedTimestamp(),
		m.GetExecutionStartTimestamp(), m.GetExecutionCompletedTimestamp(), m.GetOutputUploadStartTimestamp(),
		m.GetOutputUploadCompletedTimestamp(), m.GetWorkerCompletedTimestamp(),
	} {
		if !at.IsValid() || at.AsTime().Before(last.AsTime()) {
			t.Errorf("timestamp %d is %v after %v", i, at, last)
		}
		last = at
	}
	if d := m.GetVirtualExecutionDuration().AsDuration(); d < 300*time.Millisecond || d > 2*time.Second {
		t.Errorf("duration is %v", d)
	}
	if m.GetWorker() != "worker-"+filepath.Base(w.dir) {
		t.Errorf("worker is %q", m.GetWorker())
	}
	if code := f.ok(sh("kill -9 $$")).GetExitCode(); code != 137 {
		t.Errorf("killed: exit code %d", code)
	}
}

func TestTimeoutKeepsWhatWasWritten(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		f.worker(isolation, nil)
		m := sleepMarker()
		a := sh("echo partial; echo half > out; sleep " + m + " & sleep " + m).outputs("out")
		a.action.Timeout = durationpb.New(300 * time.Millisecond)
		r := f.run(a)
		if statusCode(r) != code.Code_DEADLINE_EXCEEDED || r.GetStatus().GetMessage() != "execution timeout exceeded" {
			t.Errorf("status is %v", r.GetStatus())
		}
		res := r.GetResult()
		if res.GetExitCode() == 0 || f.blob(res.GetStdoutDigest()) != "partial\n" || len(res.GetOutputFiles()) != 1 {
			t.Errorf("result is %v", res)
		}
		if n := marked(t, m); n != 0 {
			t.Errorf("%d processes are left", n)
		}
	})
}

func TestLogFloodIsKilledAndCut(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", func(c *worker.Config) { c.MaxLog = 1 << 20 })
	r := f.run(sh("yes"))
	if statusCode(r) != code.Code_OK || r.GetResult().GetExitCode() != 137 || !strings.Contains(r.GetMessage(), "standard output") {
		t.Errorf("response is %v", r)
	}
	if size := r.GetResult().GetStdoutDigest().GetSizeBytes(); size != 1<<20 {
		t.Errorf("stdout has %d bytes", size)
	}
}

func TestHostileActionCannotChangeCachedInputs(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		f.worker(isolation, nil)
		const original = "#!/bin/sh\necho original\n"
		victim := sh("./input; cat input > out").outputs("out")
		victim.files = map[string]string{"input": original}
		f.ok(victim)
		for i, script := range []string{
			"echo evil > input", "echo evil >> input", "chmod 777 input; echo evil > input", "rm -f input; echo evil > input",
			"mv input x; echo evil > x", "ln input y; chmod 777 y; echo evil > y", "truncate -s 1 input",
		} {
			a := sh(script + " # " + strconv.Itoa(i))
			a.files = map[string]string{"input": original}
			f.ok(a)
			again := sh("./input; cat input > out # " + strconv.Itoa(i)).outputs("out")
			again.files = map[string]string{"input": original}
			res := f.ok(again)
			if f.blob(res.GetStdoutDigest()) != "original\n" || f.blob(res.GetOutputFiles()[0].GetDigest()) != original {
				t.Errorf("after %q the next action sees %q", script, f.blob(res.GetOutputFiles()[0].GetDigest()))
			}
		}
	})
}

func TestInputThatIsAlsoAnOutputMayBeWritten(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		f.worker(isolation, nil)
		a := sh("echo more >> both").outputs("both", "same")
		a.files = map[string]string{"both": "some\n", "same": "same\n"}
		res := f.ok(a)
		if len(res.GetOutputFiles()) != 2 || f.blob(res.GetOutputFiles()[0].GetDigest()) != "some\nmore\n" ||
			f.blob(res.GetOutputFiles()[1].GetDigest()) != "same\n" {
			t.Errorf("result is %v", res)
		}
	})
}

func TestOutputOfOneActionIsInputOfTheNext(t *testing.T) {
	inEveryIsolation(t, func(f *farm, isolation string) {
		t := f.t
		f.worker(isolation, nil)
		res := f.ok(sh("printf '#!/bin/sh\\necho chained\\n' > tool; chmod 777 tool").outputs("tool"))
		next := sh("./tool; echo evil >> tool")
		next.files = map[string]string{"tool": f.blob(res.GetOutputFiles()[0].GetDigest())}
		if got := f.blob(f.ok(next).GetStdoutDigest()); got != "chained\n" {
			t.Errorf("stdout is %q", got)
		}
		next = sh("cat tool")
		next.files = map[string]string{"tool": f.blob(res.GetOutputFiles()[0].GetDigest())}
		if got := f.blob(f.ok(next).GetStdoutDigest()); strings.Contains(got, "evil") {
			t.Errorf("the cached output was changed: %q", got)
		}
	})
}

func TestDataDirectoryMayBeClosedToOtherUsers(t *testing.T) {
	f := newFarm(t)
	w := f.workerIn(t.TempDir(), "auto", nil)
	if os.Geteuid() == 0 && mayMount() && w.Isolation() != "namespaces" {
		t.Errorf("isolation is %s", w.Isolation())
	}
	a := sh("cat in > out; pwd").outputs("out")
	a.files = map[string]string{"in": "x"}
	if res := f.ok(a); len(res.GetOutputFiles()) != 1 || res.GetExitCode() != 0 {
		t.Errorf("result is %v, stderr %q", res, f.blob(res.GetStderrDigest()))
	}
}

func TestManyActionsAtOnce(t *testing.T) {
	f := newFarm(t)
	w := f.worker("auto", func(c *worker.Config) { c.Concurrency = 4 })
	var names []string
	for i := range 100 {
		a := sh(fmt.Sprintf("cat in%d > out%d", i, i)).outputs(fmt.Sprintf("out%d", i))
		a.files = map[string]string{fmt.Sprintf("in%d", i): strconv.Itoa(i)}
		names = append(names, f.submit(broker.Request{Action: f.store(a)}))
	}
	for i, name := range names {
		res := f.wait(name).GetResult()
		if len(res.GetOutputFiles()) != 1 || f.blob(res.GetOutputFiles()[0].GetDigest()) != strconv.Itoa(i) {
			t.Errorf("action %d: %v", i, res)
		}
	}
	w.stop()
	for _, dir := range []string{"run", "trash"} {
		entries, err := os.ReadDir(filepath.Join(w.dir, "actions", dir))
		if err != nil || len(entries) != 0 {
			t.Errorf("%s has %d entries left (%v)", dir, len(entries), err)
		}
	}
}

func TestLargeResultTravelsAsABlob(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	a := sh("for i in $(seq 12000); do : > dir/file-with-a-rather-long-name-$i; done")
	for i := range 12000 {
		a.command.OutputPaths = append(a.command.OutputPaths, fmt.Sprintf("dir/file-with-a-rather-long-name-%d", i+1))
	}
	r := f.run(a)
	if statusCode(r) != code.Code_OK || len(r.GetResult().GetOutputFiles()) != 12000 {
		t.Errorf("status %v, %d files", r.GetStatus(), len(r.GetResult().GetOutputFiles()))
	}
}

func TestOutputsThatCannotBeResults(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	for script, want := range map[string]string{
		"echo said; mkfifo out":                             `"out" is a named pipe`,
		"echo said; mkdir out; mkfifo out/pipe":             `"out/pipe" is a named pipe`,
		"echo said; truncate -s 10T out":                    "output limit",
		"echo said; mkdir out; touch out/$(printf '\\377')": "not UTF-8",
	} {
		r := f.run(sh(script).outputs("out"))
		if statusCode(r) != code.Code_FAILED_PRECONDITION || !strings.Contains(r.GetStatus().GetMessage(), want) || len(r.GetStatus().GetDetails()) != 0 {
			t.Errorf("%q: status is %v, want %q", script, r.GetStatus(), want)
		}
		if f.blob(r.GetResult().GetStdoutDigest()) != "said\n" {
			t.Errorf("%q: stdout is lost", script)
		}
	}
}

func TestCommandOfAnOlderClient(t *testing.T) {
	f := newFarm(t)
	f.worker("auto", nil)
	a := sh("echo f > file; mkdir dir; echo x > dir/x; ln -s file link; ln -s dir dirlink; ln -s nowhere dangling")
	a.command.OutputFiles = []string{"dangling", "file", "link", "parent/missing"} //nolint:staticcheck // clients of REAPI 2.0 use these fields
	a.command.OutputDirectories = []string{"dir", "dirlink"}                       //nolint:staticcheck // clients of REAPI 2.0 use these fields
	res := f.ok(a)
	if len(res.GetOutputFiles()) != 1 || len(res.GetOutputDirectories()) != 1 || len(res.GetOutputFileSymlinks()) != 2 || //nolint:staticcheck // clients of REAPI 2.0 use these fields
		len(res.GetOutputDirectorySymlinks()) != 1 || len(res.GetOutputSymlinks()) != 0 { //nolint:staticcheck // clients of REAPI 2.0 use these fields
		t.Errorf("result is %v", res)
	}
	both := sh("echo f > new")
	both.command.OutputPaths, both.command.OutputFiles = []string{"new"}, []string{"/malformed/"} //nolint:staticcheck // clients of REAPI 2.0 use these fields
	if res := f.ok(both); len(res.GetOutputFiles()) != 1 {
		t.Errorf("result is %v", res)
	}
	wrong := sh("mkdir out")
	wrong.command.OutputFiles = []string{"out"} //nolint:staticcheck // clients of REAPI 2.0 use these fields
	if r := f.run(wrong); statusCode(r) != code.Code_FAILED_PRECONDITION {
		t.Errorf("a directory where a file was promised: %v", r.GetStatus())
	}
}

// The clocks of frontend and worker differ by a day: the timestamps of a result are in order all the same, and
// the timeout is measured with neither.
func TestX_117_ClocksThatDiffer(t *testing.T) {
	f := newFarm(t)
	js, err := jetstream.New(f.broker.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	jobs, err := js.Stream(t.Context(), "JOBS")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, shift := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
		a := sh("sleep 0.2 # " + shift.String())
		a.action.Timeout = durationpb.New(time.Minute)
		names = append(names, f.submit(broker.Request{Action: f.store(a)}))
		all := f.broker.All(t, "JOBS")
		m := all[len(all)-1]
		var record map[string]any
		if err := json.Unmarshal(m.Data, &record); err != nil {
			t.Fatal(err)
		}
		record["queued"] = time.Now().Add(shift)
		data, err := json.Marshal(record)
		if err == nil {
			err = jobs.DeleteMsg(t.Context(), m.Sequence)
		}
		if err == nil {
			_, err = js.Publish(t.Context(), m.Subject, append(data, 0x0a))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f.worker("auto", nil)
	for _, name := range names {
		r := f.wait(name)
		m := r.GetResult().GetExecutionMetadata()
		last := m.GetQueuedTimestamp().AsTime()
		for i, at := range []*timestamppb.Timestamp{
			m.GetWorkerStartTimestamp(), m.GetInputFetchStartTimestamp(), m.GetInputFetchCompletedTimestamp(),
			m.GetExecutionStartTimestamp(), m.GetExecutionCompletedTimestamp(), m.GetOutputUploadStartTimestamp(),
			m.GetOutputUploadCompletedTimestamp(), m.GetWorkerCompletedTimestamp(),
		} {
			if !at.IsValid() || at.AsTime().Before(last) {
				t.Errorf("timestamp %d is %v after %v", i, at.AsTime(), last)
			}
			last = at.AsTime()
		}
		if d := m.GetVirtualExecutionDuration().AsDuration(); statusCode(r) != code.Code_OK || d <= 0 || d > 30*time.Second {
			t.Errorf("it took %v: %v", d, r.GetStatus())
		}
		if shifted := time.Until(m.GetQueuedTimestamp().AsTime()).Abs(); shifted < 23*time.Hour {
			t.Errorf("the operation was queued %v from now, so the clocks agree", shifted)
		}
	}
}
