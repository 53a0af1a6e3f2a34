package upstream

import "github.com/prometheus/client_golang/prometheus"

// metrics counts what goes to and comes from the upstream. Labels are words of this package and gRPC
// codes.
type metrics struct {
	requests *prometheus.CounterVec
	received prometheus.Counter
	sent     prometheus.Counter
	fetches  *prometheus.CounterVec
	lookups  *prometheus.CounterVec
	copies   *prometheus.CounterVec
	resumed  prometheus.Counter
	aside    prometheus.Counter
}

// newMetrics registers with r unless that is nil.
func newMetrics(r prometheus.Registerer, up func() bool) *metrics {
	options := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "upstream", Name: name, Help: help}
	}
	m := &metrics{
		requests: prometheus.NewCounterVec(options("requests_total", "Calls to the upstream cache, by method and gRPC code."), []string{"method", "code"}),
		received: prometheus.NewCounter(options("received_bytes_total", "Bytes of blobs that came from the upstream cache, as they travelled.")),
		sent:     prometheus.NewCounter(options("sent_bytes_total", "Bytes of blobs that went to the upstream cache, as they travelled.")),
		fetches:  prometheus.NewCounterVec(options("fetches_total", "Blobs that the farm did not have and asked for, by result."), []string{"result"}),
		lookups:  prometheus.NewCounterVec(options("action_cache_lookups_total", "Results that the farm did not have and asked for, by result."), []string{"result"}),
		copies:   prometheus.NewCounterVec(options("copies_total", "Blobs and action results to be copied to the upstream cache, by kind and result."), []string{"kind", "result"}),
		resumed:  prometheus.NewCounter(options("resumed_fetches_total", "Fetches that broke off and went on where they had been.")),
		aside:    prometheus.NewCounter(options("slow_readers_total", "Readers of a fetch that were too slow for it and went on from the stored copy.")),
	}
	if r != nil {
		r.MustRegister(m.requests, m.received, m.sent, m.fetches, m.lookups, m.copies, m.resumed, m.aside,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Namespace: "jetfarm", Subsystem: "upstream", Name: "up", Help: "1 while the upstream cache answers.",
			}, func() float64 {
				if up() {
					return 1
				}
				return 0
			}))
	}
	return m
}

// queued registers the gauge of a queue with r unless that is nil.
func queued(r prometheus.Registerer, kind string, length func() int) {
	if r == nil {
		return
	}
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "jetfarm", Subsystem: "upstream", Name: "queue_entries", Help: "What waits to be copied, by kind.",
		ConstLabels: prometheus.Labels{"kind": kind},
	}, func() float64 { return float64(length()) }))
}
