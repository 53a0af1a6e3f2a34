package disk

import (
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	hits, misses, evictions, fetched, gaveWay prometheus.Counter
}

func newMetrics(r prometheus.Registerer, t *Tier) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "disk", Name: name, Help: help})
	}
	gauge := func(name, help string, value func() int64) prometheus.GaugeFunc {
		opts := prometheus.GaugeOpts{Namespace: "jetfarm", Subsystem: "disk", Name: name, Help: help}
		return prometheus.NewGaugeFunc(opts, func() float64 {
			t.mu.Lock()
			defer t.mu.Unlock()
			return float64(value())
		})
	}
	m := &metrics{
		hits:      counter("hits_total", "Blobs that were asked for and held."),
		misses:    counter("misses_total", "Blobs that were asked for and had to be fetched."),
		evictions: counter("evictions_total", "Files that were deleted to make room."),
		fetched:   counter("fetched_bytes_total", "Bytes that were fetched from the source."),
		gaveWay:   counter("gave_way_total", "Reads that went to the source because the tier's file system failed."),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.hits, m.misses, m.evictions, m.fetched, m.gaveWay,
		gauge("used_bytes", "Size of the files held, in whole blocks.", func() int64 { return t.index.used }),
		gauge("files", "Number of files held.", func() int64 { return int64(t.index.len()) }),
		gauge("limit_bytes", "Size that the files may have.", func() int64 { return t.max }),
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
