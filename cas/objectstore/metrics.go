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

	rotations, evictedBlobs, evictedBytes, purged prometheus.Counter
	copiedBlobs, copiedBytes, copyFailures        prometheus.Counter
	evictedAge                                    prometheus.Gauge
}

func newMetrics(r prometheus.Registerer, s *Store) (*metrics, error) {
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

		rotations:    counter("rotations_total", "Generations that this process has begun."),
		evictedBlobs: counter("evicted_blobs_total", "Blobs in generations that this process has dropped, those copied forward before included."),
		evictedBytes: counter("evicted_bytes_total", "Bytes of the generations that this process has dropped."),
		purged:       counter("purged_uploads_total", "Uploads that broke off whose chunks this process has removed."),
		copiedBlobs:  counter("copied_blobs_total", "Blobs that this process has copied from an old generation into the current one."),
		copiedBytes:  counter("copied_bytes_total", "Bytes of those blobs."),
		copyFailures: counter("copy_failures_total", "Blobs that could not be copied."),
		evictedAge: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "jetfarm", Subsystem: "cas", Name: "evicted_age_seconds",
			Help: "How long ago the generation that was dropped last was written to, in the process that dropped it.",
		}),
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "jetfarm", Subsystem: "cas", Name: name, Help: help}, f)
	}
	if r == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.puts, m.gets, m.writtenBytes, m.readBytes, m.lostAnnouncements, m.repairs, m.orphans,
		m.rotations, m.evictedBlobs, m.evictedBytes, m.purged, m.copiedBlobs, m.copiedBytes, m.copyFailures, m.evictedAge,
		gauge("index_entries", "Blobs that the index knows.", func() float64 { return float64(s.index.len()) }),
		gauge("generations", "Generations that live.", func() float64 { return float64(len(s.generations())) }),
		gauge("stored_bytes", "Bytes of all streams of blobs when the rotator looked last.", func() float64 { return float64(s.known().Used) }),
		gauge("limit_bytes", "Most bytes of all streams of blobs; 0 is no bound.", func() float64 { return float64(s.known().Limit) }),
		gauge("full", "1 while no blob can be stored.", func() float64 {
			if s.known().Full != "" {
				return 1
			}
			return 0
		}),
	} {
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
