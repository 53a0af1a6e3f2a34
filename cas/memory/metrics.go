package memory

import (
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	hits, misses, evictions prometheus.Counter
}

func newMetrics(r prometheus.Registerer, t *Tier, limit int64) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "memory", Name: name, Help: help})
	}
	gauge := func(name, help string, value func() int64) prometheus.GaugeFunc {
		opts := prometheus.GaugeOpts{Namespace: "jetfarm", Subsystem: "memory", Name: name, Help: help}
		return prometheus.NewGaugeFunc(opts, func() float64 { return float64(value()) })
	}
	m := &metrics{
		hits:      counter("hits_total", "Small blobs that were asked for and held in memory."),
		misses:    counter("misses_total", "Small blobs that were asked for and had to be read."),
		evictions: counter("evictions_total", "Small blobs that were dropped to make room."),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.hits, m.misses, m.evictions,
		gauge("blobs", "Number of small blobs held in memory.", func() int64 {
			return t.sum(func(s *shard) int64 { return int64(len(s.items)) })
		}),
		gauge("used_bytes", "Size of the small blobs held in memory, with what it takes to hold them.", func() int64 {
			return t.sum(func(s *shard) int64 { return s.held })
		}),
		gauge("limit_bytes", "Size that the small blobs in memory may have.", func() int64 { return limit }),
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (t *Tier) sum(part func(*shard) int64) (total int64) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		total += part(s)
		s.mu.RUnlock()
	}
	return total
}
