package frontend

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// httpMetrics counts requests of the HTTP cache.
type httpMetrics struct {
	duration *prometheus.HistogramVec
	inFlight prometheus.Gauge
}

// newHTTPMetrics registers with r unless that is nil.
func newHTTPMetrics(r prometheus.Registerer) *httpMetrics {
	m := &httpMetrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "jetfarm", Subsystem: "frontend", Name: "http_duration_seconds",
			Help:    "How long requests of the HTTP cache took, by method, store and status.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60, 600},
		}, []string{"method", "store", "code"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "jetfarm", Subsystem: "frontend", Name: "http_in_flight_requests", Help: "Requests of the HTTP cache that are being served.",
		}),
	}
	if r != nil {
		r.MustRegister(m.duration, m.inFlight)
	}
	return m
}

// method is the label for a method; a client may send any word.
func (*httpMetrics) method(name string) string {
	switch name {
	case http.MethodGet, http.MethodHead, http.MethodPut:
		return name
	}
	return "other"
}

// begin counts a request; what it returns is called with the status that was answered.
func (m *httpMetrics) begin(method, store string) (end func(status int)) {
	start := time.Now()
	m.inFlight.Inc()
	return func(status int) {
		m.inFlight.Dec()
		m.duration.WithLabelValues(m.method(method), store, strconv.Itoa(status)).Observe(time.Since(start).Seconds())
	}
}
