package objectstore

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/jetfarm/jetfarm/cas"
)

// metrics counts what a Store does.
type metrics struct {
	puts, gets              *prometheus.CounterVec // by result
	writtenBytes, readBytes prometheus.Counter
	lostAnnouncements       prometheus.Counter
	repairs                 prometheus.Counter
	orphans                 prometheus.Counter
}

func newMetrics(r prometheus.Registerer, x *index) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "cas", Name: name, Help: help})
	}
	byResult := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "jetfarm", Subsystem: "cas", Name: name, Help: help}, []string{"result"})
	}
	m := &metrics{
		puts:              byResult("puts_total", "Blobs offered to the object store, by how the put ended."),
		gets:              byResult("gets_total", "Blobs asked of the object store, by how the open ended."),
		writtenBytes:      counter("written_bytes_total", "Bytes of blobs that puts of this process stored or found stored."),
		readBytes:         counter("read_bytes_total", "Bytes of blobs read from the object store by this process."),
		lostAnnouncements: counter("announcements_lost_total", "Stored blobs that other processes were not told of, because too many waited."),
		repairs:           counter("index_repairs_total", "Listings of the live generations after a gap in the announcements."),
		orphans:           counter("orphaned_uploads_total", "Failed uploads whose chunks could not be removed."),
	}
	entries := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "jetfarm", Subsystem: "cas", Name: "index_entries", Help: "Blobs that the index knows.",
	}, func() float64 { return float64(x.len()) })
	if r == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.puts, m.gets, m.writtenBytes, m.readBytes, m.lostAnnouncements, m.repairs, m.orphans, entries} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}

// result is the label for how a call ended.
func result(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, cas.ErrNotFound):
		return "not_found"
	case errors.Is(err, cas.ErrMismatch):
		return "mismatch"
	case errors.Is(err, cas.ErrFull):
		return "full"
	case errors.Is(err, cas.ErrUnavailable):
		return "unavailable"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "interrupted"
	}
	return "failed"
}
