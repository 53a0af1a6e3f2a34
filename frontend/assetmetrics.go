package frontend

import "github.com/prometheus/client_golang/prometheus"

// assetMetrics counts requests for assets and downloads.
type assetMetrics struct {
	requests  *prometheus.CounterVec
	bytes     prometheus.Counter
	downloads prometheus.Gauge
}

// newAssetMetrics registers with r unless that is nil. spooled is the number of bytes held.
func newAssetMetrics(r prometheus.Registerer, spooled func() int64) *assetMetrics {
	name := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "jetfarm", Subsystem: "frontend", Name: name, Help: help}
	}
	m := &assetMetrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts(name("asset_requests_total",
			"Requests for assets, by kind, where they were found and result.")), []string{"kind", "from", "result"}),
		bytes:     prometheus.NewCounter(prometheus.CounterOpts(name("asset_downloaded_bytes_total", "Bytes that origins have sent."))),
		downloads: prometheus.NewGauge(prometheus.GaugeOpts(name("asset_downloads", "Downloads that are running."))),
	}
	if r != nil {
		r.MustRegister(m.requests, m.bytes, m.downloads, prometheus.NewGaugeFunc(
			prometheus.GaugeOpts(name("asset_spool_bytes", "Bytes that are held until their digest is known.")),
			func() float64 { return float64(spooled()) },
		))
	}
	return m
}
