package run

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// ProbeConfig says what a process's probes look at.
type ProbeConfig struct {
	// Ready returns nil while the process can do its work, which it tries.
	Ready func(context.Context) error
	// Draining is closed when the process takes no more work; nil for one that tells through Ready.
	Draining <-chan struct{}
	Gatherer prometheus.Gatherer
	// Pprof serves Go's profiles.
	Pprof bool
}

// readyBound is how long a readiness probe may take.
const readyBound = 2 * time.Second

var errSlow = errors.New("no answer within 2 s")

// Probes serves /healthz while the process is alive, /readyz while it can do its work, /metrics and,
// if asked, /debug/pprof.
func Probes(cfg ProbeConfig) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-cfg.Draining:
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		default:
		}
		ctx, cancel := context.WithTimeoutCause(r.Context(), readyBound, errSlow)
		defer cancel()
		if err := cfg.Ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Gatherer, promhttp.HandlerOpts{}))
	if cfg.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", unhurried(pprof.Profile))
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("POST /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", unhurried(pprof.Trace))
	}
	return mux
}

// profileTimeout bounds the profiles that take as long as their request says.
const profileTimeout = time.Hour

func unhurried(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(profileTimeout)) //nolint:errcheck // the server's own writer has deadlines
		h(w, r)
	}
}
