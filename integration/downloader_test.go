package integration_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// An originServer serves files and remembers who has asked for them.
type originServer struct {
	*httptest.Server
	files  map[string][]byte
	mu     sync.Mutex // guards agents
	agents []string
}

func startOrigin(t *testing.T, files map[string][]byte) *originServer {
	t.Helper()
	o := &originServer{files: files}
	o.Server = httptest.NewServer(o)
	t.Cleanup(o.Close)
	return o
}

func (o *originServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	o.agents = append(o.agents, r.Header.Get("User-Agent"))
	o.mu.Unlock()
	if data, ok := o.files[r.URL.Path]; ok {
		_, _ = w.Write(data) //nolint:errcheck // the client may leave
		return
	}
	w.WriteHeader(http.StatusNotFound)
}

// asked returns who has asked since the last call.
func (o *originServer) asked() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	agents := o.agents
	o.agents = nil
	return agents
}

// tarGz is an archive with a package that has a genrule.
func tarGz(t *testing.T, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for name, data := range map[string]string{
		"top/WORKSPACE": "", "top/data.txt": content,
		"top/BUILD": `genrule(name = "copy", srcs = ["data.txt"], outs = ["copy.txt"], cmd = "cp $< $@", visibility = ["//visibility:public"])`,
	} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Bazel has the farm download what its repositories name, from an origin that it never asks itself.
func TestBazelRemoteDownloader(t *testing.T) {
	unique := rand.Text() // Bazel keeps what it has downloaded once
	file, archive := []byte("a file "+unique), tarGz(t, "data in an archive "+unique)
	origin := startOrigin(t, map[string][]byte{"/file.txt": file, "/archive.tar.gz": archive, "/other.txt": []byte("not what was expected")})
	hash := func(data []byte) string {
		sum := sha256.Sum256(data)
		return hex.EncodeToString(sum[:])
	}
	b := useBazel(t)
	const workspace = `workspace(name = "jetfarm_integration")`
	b.edit(t, "WORKSPACE", workspace, workspace+fmt.Sprintf(`
load("@bazel_tools//tools/build_defs/repo:http.bzl", "http_archive", "http_file")
http_file(name = "fetched_file", urls = ["%[1]s/none.txt", "%[1]s/file.txt"], sha256 = "%[2]s")
http_file(name = "wrong_file", urls = ["%[1]s/other.txt"], sha256 = "%[4]s")
http_archive(name = "fetched_archive", urls = ["%[1]s/archive.tar.gz"], sha256 = "%[3]s", strip_prefix = "top")
`, origin.URL, hash(file), hash(archive), hash([]byte("other "+unique))))
	f := &allInOne{data: dataDir(t), flags: []string{"--fetch-allow", "127.0.0.1/32"}}
	f.start(t)
	build := func(target string) *invocation {
		t.Helper()
		endpoint := "grpc://" + f.endpoint(t)
		inv, err := b.try(t.Context(), "build", "--remote_executor="+endpoint, "--experimental_remote_downloader="+endpoint, target)
		if err != nil {
			t.Fatal(err)
		}
		return inv
	}
	onlyFarm := func() {
		t.Helper()
		agents := origin.asked()
		if len(agents) == 0 {
			t.Error("nobody has asked the origin")
		}
		for _, agent := range agents {
			if agent != "jetfarm" {
				t.Errorf("the origin was asked by %q", agent)
			}
		}
	}
	for _, target := range []string{"@fetched_file//file", "@fetched_archive//:copy"} {
		if inv := build(target); inv.exitCode != success {
			t.Errorf("%v\n%s", inv, inv.output)
		}
		onlyFarm()
	}
	if inv := build("@wrong_file//file"); inv.exitCode == success || !strings.Contains(inv.output, "wrong_file") {
		t.Errorf("a file with another checksum: %v\n%s", inv, inv.output)
	}
	onlyFarm()
	metrics := httpGet(t, "http://"+f.up.field(t, "http")+"/metrics")
	for _, want := range []string{
		`jetfarm_frontend_asset_requests_total{from="origin",kind="blob",result="ok"} 2`,
		`jetfarm_frontend_asset_requests_total{from="origin",kind="blob",result="Aborted"}`,
		"jetfarm_frontend_asset_spool_bytes 0",
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
}
