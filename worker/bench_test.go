package worker_test

import (
	"log/slog"
	"path/filepath"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/cas/castest"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/jetfarm/jetfarm/cas/disk"
	"github.com/jetfarm/jetfarm/worker"
)

// BenchmarkRunTrue is a whole job but for the broker and the object store: fetch, layout, run, collect
// and upload of /bin/true with one small input.
func BenchmarkRunTrue(b *testing.B) {
	for _, isolation := range isolations() {
		b.Run(isolation, func(b *testing.B) {
			dir := openDir(b)
			space, err := digest.SpaceOf("", repb.DigestFunction_SHA256, "")
			if err != nil {
				b.Fatal(err)
			}
			log := slog.New(slog.DiscardHandler)
			f := &farm{t: b, blobs: &castest.Faulty{Store: castest.NewMemory()}, space: space, log: log}
			tier, err := disk.Open(b.Context(), disk.Config{Dir: filepath.Join(dir, "cache"), MaxBytes: 1 << 30, Source: f.blobs, Log: log})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = tier.Close() })
			w, err := worker.New(worker.Config{
				Name: "bench", Dir: filepath.Join(dir, "actions"), Isolation: isolation, Blobs: f.blobs, Disk: tier, Log: log,
			})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = w.Close() })
			a := sh("")
			a.command.Arguments = []string{"/bin/true"}
			a.files = map[string]string{"in": "x"}
			d := f.store(a)
			for b.Loop() {
				r, err := w.Execute(b.Context(), d)
				if err != nil || r.GetResult().GetExitCode() != 0 {
					b.Fatal(r, err)
				}
			}
		})
	}
}

// BenchmarkJobTrue is a job from Submit to its terminal state, one after the other.
func BenchmarkJobTrue(b *testing.B) {
	f := newFarm(b)
	f.worker("auto", nil)
	a := sh("")
	a.command.Arguments = []string{"/bin/true"}
	a.action.DoNotCache = true
	d := f.store(a)
	for b.Loop() {
		f.wait(f.submit(broker.Request{Action: d, DoNotCache: true}))
	}
}
