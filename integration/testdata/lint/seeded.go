// Package seeded has what the linters must find. A line that ends in "want" and a linter's name must be
// reported by that linter: .ci/seeded checks it.
package seeded

import (
	"context"
	"io"
	"net/http"
	"time"
)

// Lost never ends the context that it makes.
func Lost(ctx context.Context) context.Context {
	lost, _ := context.WithCancelCause(ctx) // want govet
	return lost
}

// Rootless goes on when its caller has given up.
func Rootless(work func(context.Context) error) error {
	return work(context.Background()) // want forbidigo
}

// Detached goes on without a bound.
func Detached(ctx context.Context, work func(context.Context) error) error {
	return work(context.WithoutCancel(ctx)) // want forbidigo
}

// Endless waits for ever.
func Endless() (*http.Response, error) {
	return http.Get("http://127.0.0.1") // want noctx
}

// Deaf waits although its caller has given up.
func Deaf(ctx context.Context) error {
	time.Sleep(time.Hour)   // want forbidigo
	<-time.After(time.Hour) // want forbidigo
	return ctx.Err()
}

// Stuck writes into a pipe that nobody reads.
func Stuck() error {
	_, w := io.Pipe() // want forbidigo
	return w.Close()
}
