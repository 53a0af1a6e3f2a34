package actioncache

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// register makes the use of the memory known to r unless that is nil.
func (m *memory) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	const namespace, subsystem = "jetfarm", "ac"
	return errors.Join(
		r.Register(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "memory_hits_total", Help: "Action cache entries that were found in memory.",
		}, func() float64 {
			_, hits := m.usage()
			return float64(hits)
		})),
		r.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "memory_used_bytes", Help: "Bytes of action cache entries in memory.",
		}, func() float64 {
			bytes, _ := m.usage()
			return float64(bytes)
		})),
	)
}
