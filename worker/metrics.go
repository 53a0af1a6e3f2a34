package worker

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what a worker counts. The labels have fixed sets of values.
type metrics struct {
	stages   *prometheus.HistogramVec
	busy     prometheus.Gauge
	outcomes *prometheus.CounterVec
	// outOfOrder is 1 while the worker has taken itself out.
	outOfOrder  prometheus.Gauge
	ownFailures prometheus.Counter
}

// The outcomes of a job.
const (
	outcomeExecuted    = "executed"    // exit code 0
	outcomeFailed      = "failed"      // any other exit code
	outcomeTimeout     = "timeout"     // the action's timeout
	outcomeRejected    = "rejected"    // the client's fault
	outcomeCached      = "cached"      // an earlier attempt had finished
	outcomeReturned    = "returned"    // given back to the queue
	outcomeUnavailable = "unavailable" // given back for the last time
	outcomeLost        = "lost"        // cancelled or taken over
)

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "jetfarm_worker_stage_seconds", Help: "How long the stages of jobs took.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 16),
		}, []string{"stage"}),
		busy: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "jetfarm_worker_busy_slots", Help: "Slots in which an action is prepared or runs.",
		}),
		outcomes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "jetfarm_worker_jobs_total", Help: "Jobs by how they ended.",
		}, []string{"outcome"}),
		outOfOrder: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "jetfarm_worker_out_of_order", Help: "1 while the worker takes no jobs because its machine failed.",
		}),
		ownFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "jetfarm_worker_own_failures_total", Help: "Jobs that failed because of the worker's machine.",
		}),
	}
	if r != nil {
		r.MustRegister(m.stages, m.busy, m.outcomes, m.outOfOrder, m.ownFailures)
	}
	return m
}

// stage begins the measurement of a stage; the result ends it.
func (m *metrics) stage(name string) func() {
	begun := time.Now()
	return func() { m.stages.WithLabelValues(name).Observe(time.Since(begun).Seconds()) }
}
