package integration_test

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

var (
	helpFlag   = regexp.MustCompile(`(?m)^\s+(?:-\w, )?(--[a-z-]+)`)
	metricName = regexp.MustCompile(`(?m)^# TYPE (jetfarm_\w+) `)
)

// What an operator can set and see is in docs/OPERATIONS.md.
func TestOperationsNamesEveryFlagAndMetric(t *testing.T) {
	text, err := os.ReadFile("../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := func(name string) bool {
		return regexp.MustCompile("`" + regexp.QuoteMeta(name) + "[` ]").Match(text)
	}
	for _, command := range []string{"up", "broker", "frontend", "worker", "bazelrc", "cas put", "cas get", "cas stat", "cas ls", "cas tree", "cas verify", "cas gc", "doctor"} {
		help, err := exec.CommandContext(t.Context(), binary(t), append(strings.Fields(command), "--help")...).Output()
		if err != nil {
			t.Fatalf("jetfarm %s --help: %v", command, err)
		}
		flags := helpFlag.FindAllStringSubmatch(string(help), -1)
		if len(flags) < 3 {
			t.Errorf("jetfarm %s --help lists %d flags", command, len(flags))
		}
		for _, flag := range flags {
			if !documented(flag[1]) {
				t.Errorf("%s of jetfarm %s is not documented", flag[1], command)
			}
		}
	}

	f := startUp(t)
	c := dial(t, f.endpoint(t))
	a := shell(t, "metrics", "exit 0")
	if err := c.put(t.Context(), a.blobs...); err != nil {
		t.Fatal(err)
	}
	if _, err := c.execute(t.Context(), a.digest); err != nil {
		t.Fatal(err)
	}
	metrics := metricName.FindAllStringSubmatch(httpGet(t, "http://"+f.up.field(t, "http")+"/metrics"), -1)
	parts := map[string]bool{}
	for _, metric := range metrics {
		parts[strings.Split(metric[1], "_")[1]] = true
		if !documented(metric[1]) {
			t.Errorf("metric %s is not documented", metric[1])
		}
	}
	for _, part := range []string{"cas", "disk", "frontend", "worker"} {
		if !parts[part] {
			t.Errorf("there are no metrics of %s", part)
		}
	}
}
