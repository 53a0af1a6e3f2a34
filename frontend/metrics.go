package frontend

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts what the frontend does. Labels are names of this program's own: methods, codes and
// outcomes, never something that a client sent.
type metrics struct {
	duration *prometheus.HistogramVec
	inFlight *prometheus.GaugeVec
	received *prometheus.CounterVec
	sent     *prometheus.CounterVec
	lookups  *prometheus.CounterVec
	panics   prometheus.Counter
	stalls   prometheus.Counter
}

// newMetrics registers with r unless that is nil. waiting is the number of open operation streams.
func newMetrics(r prometheus.Registerer, waiting func() int) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "frontend", Name: name, Help: help}, labels)
	}
	m := &metrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "jetfarm", Subsystem: "frontend", Name: "rpc_duration_seconds",
			Help:    "How long calls took, by method and gRPC code.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60, 600},
		}, []string{"method", "code"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: "jetfarm", Subsystem: "frontend", Name: "rpc_in_flight_calls", Help: "Calls that are being served, by method.",
		}, []string{"method"}),
		received: counter("received_bytes_total", "Bytes of blobs that clients sent, by service.", "service"),
		sent:     counter("sent_bytes_total", "Bytes of blobs that clients read, by service.", "service"),
		lookups:  counter("action_cache_lookups_total", "Looks into the action cache, by result.", "result"),
	}
	simple := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "frontend", Name: name, Help: help})
	}
	m.panics = simple("panics_total", "Handlers that panicked.")
	m.stalls = simple("stalled_streams_total", "Streams that were ended because their client neither sent nor received.")
	if r != nil {
		r.MustRegister(m.duration, m.inFlight, m.received, m.sent, m.lookups, m.panics, m.stalls,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Namespace: "jetfarm", Subsystem: "frontend", Name: "waiting_streams", Help: "Open Execute and WaitExecution streams.",
			}, func() float64 { return float64(waiting()) }))
	}
	return m
}
