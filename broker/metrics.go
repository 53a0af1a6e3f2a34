package broker

import "github.com/prometheus/client_golang/prometheus"

// metrics are what a process counts of the operations that it mends or gives up.
type metrics struct {
	dead   prometheus.Counter
	mended *prometheus.CounterVec
}

// What mended counts.
const (
	mendedJob      = "job"      // an operation that had no job
	mendedStuck    = "stuck"    // a job that the broker did not deliver any more
	mendedLeft     = "left"     // a job of an operation that has ended
	mendedFlight   = "flight"   // a flight of an operation that has ended
	mendedHung     = "hung"     // an attempt that its worker did not end in time
	mendedConsumer = "consumer" // a pool that nobody could take from
)

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		dead: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "jetfarm_broker_dead_operations_total", Help: "Operations that this process set aside because all their attempts failed.",
		}),
		mended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "jetfarm_broker_mended_total", Help: "What this process mended that others had left undone.",
		}, []string{"what"}),
	}
	if r != nil {
		r.MustRegister(m.dead, m.mended)
	}
	return m
}
