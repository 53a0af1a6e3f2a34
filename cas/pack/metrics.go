package pack

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	hits, misses, damaged, skipped, dropped, failures prometheus.Counter
}

func newMetrics(r prometheus.Registerer, p *Pack) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "pack", Name: name, Help: help})
	}
	gauge := func(name, help string, value func() int64) prometheus.GaugeFunc {
		opts := prometheus.GaugeOpts{Namespace: "jetfarm", Subsystem: "pack", Name: name, Help: help}
		return prometheus.NewGaugeFunc(opts, func() float64 { return float64(value()) })
	}
	m := &metrics{
		hits:     counter("hits_total", "Small blobs that were not in memory and were read from the pack."),
		misses:   counter("misses_total", "Small blobs that were in neither and had to be read from the farm."),
		damaged:  counter("damaged_total", "Small blobs whose bytes in the pack had not their digest. They are read from the farm."),
		skipped:  counter("skipped_total", "Small blobs that were not kept because there was no room at once."),
		dropped:  counter("dropped_segments_total", "Segments that were deleted to make room, oldest first."),
		failures: counter("failures_total", "Writes that failed. Nothing is kept for 10 s after one."),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.hits, m.misses, m.damaged, m.skipped, m.dropped, m.failures,
		gauge("blobs", "Number of small blobs in the pack.", p.table.len),
		gauge("used_bytes", "Size of the pack's files.", p.bytes),
		gauge("limit_bytes", "Size that the pack's files may have.", func() int64 { return p.cfg.MaxBytes }),
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
