package actioncache_test

import (
	"errors"
	"log/slog"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/jetfarm/jetfarm/cas/actioncache"
)

func BenchmarkGet(b *testing.B) {
	x := start(b)
	result := &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"}, StdoutDigest: x.blob(b, []byte("out"))}
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		result.OutputFiles = append(result.OutputFiles, &repb.OutputFile{Path: "bazel-out/bin/" + name, Digest: x.blob(b, []byte(name))})
	}
	a := action(x, "a")
	x.put(b, a, result)
	b.Run("hit", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := x.Get(b.Context(), a); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("memory", func(b *testing.B) {
		cfg := actioncache.Config{Conn: x.nc, Blobs: x.store, Log: slog.New(slog.DiscardHandler)}
		remember(&cfg)
		y, err := actioncache.Open(b.Context(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		run(b, y)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := y.Get(b.Context(), a); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("miss", func(b *testing.B) {
		for b.Loop() {
			if _, err := x.Get(b.Context(), action(x, "none")); !errors.Is(err, actioncache.ErrNotFound) {
				b.Fatal(err)
			}
		}
	})
	b.Run("put", func(b *testing.B) {
		for b.Loop() {
			x.put(b, a, result)
		}
	})
}
