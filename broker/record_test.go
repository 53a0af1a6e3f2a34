package broker_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// TestPayloads freezes subjects and payloads: processes of neighbouring versions read each other's.
// Run with UPDATE_GOLDEN=1 to write the file anew, and describe the change in docs/PROTOCOL.md.
func TestPayloads(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	platform := must(broker.PlatformOf(asked("OSFamily=linux")))
	operation := submit(t, c, broker.Request{
		Action: action(1), Platform: platform, Priority: -3, SkipCacheLookup: true,
		Metadata: &repb.RequestMetadata{ToolInvocationId: "invocation"},
	})
	var got []map[string]any
	for _, stream := range []string{"FLIGHTS", "OPERATIONS", "JOBS"} {
		for _, msg := range farm.All(t, stream) {
			got = append(got, map[string]any{"stream": stream, "subject": msg.Subject, "payload": string(msg.Data)})
		}
	}
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Platform: platform})
	settle(t, begin(t, q), 1)
	for _, msg := range farm.All(t, "OPERATIONS") {
		got = append(got, map[string]any{"stream": "OPERATIONS", "subject": msg.Subject, "payload": string(msg.Data), "ttl": msg.Header.Get("Nats-TTL")})
	}
	text := must(json.MarshalIndent(got, "", "  "))
	text = regexp.MustCompile(operation).ReplaceAll(text, []byte("OPERATION"))
	text = regexp.MustCompile(`\\"holder\\":\\"[A-Z2-7]{26}`).ReplaceAll(text, []byte(`\"holder\":\"HOLDER`))
	text = regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`).ReplaceAll(text, []byte("TIME"))
	text = append(text, '\n')
	golden := filepath.Join("testdata", "payloads.json")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(text)); diff != "" {
		t.Errorf("payloads changed (-want +got):\n%s", diff)
	}
}

// FuzzName: whatever a client sends as a name is not found, and is never part of a subject.
func FuzzName(f *testing.F) {
	for _, name := range []string{"", "nope", "jetfarm.op.*", ">", "ABCDEFGHIJKLMNOPQRSTUVWXY.", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "ABCDEFGHIJKLMNOPQRSTUVWXYZ-ABCDEFGHIJKLM", "ABCDEFGHIJKLMNOPQRSTUVWXYZ-", "A-ABCDEFGHIJKLM"} {
		f.Add(name)
	}
	farm := brokertest.Start(f)
	c := farm.Client(f)
	f.Fuzz(func(t *testing.T, name string) {
		if op, err := c.Get(t.Context(), name); err == nil {
			t.Errorf("Get(%q) = %+v, want ErrNotFound", name, op)
		}
	})
}
