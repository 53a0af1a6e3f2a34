package main

import (
	"context"
	"os"
	"runtime"

	"github.com/jetfarm/jetfarm/cmd/app"
	"github.com/jetfarm/jetfarm/cmd/run"
)

func init() { //nolint:gochecknoinits // must happen before the runtime hands the main thread to a goroutine
	// A worker changes the namespaces of threads that it then throws away. The main thread can't be
	// thrown away, so no goroutine but main may run on it, which only waits for the others.
	runtime.LockOSThread()
}

func main() {
	os.Exit(run.Main(func(ctx context.Context) error {
		return app.Run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	}))
}
