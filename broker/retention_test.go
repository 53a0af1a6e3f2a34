package broker_test

import (
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// Row WAIT-4: a finished operation is kept for more than ten minutes, however it ended, and also when the output
// of a cancelled one is noted.
func TestWAIT_4_FinishedOperationsAreKept(t *testing.T) {
	farm := brokertest.Start(t)
	c := farm.Client(t)
	q := brokertest.Queue(t, c, worker("w1"))
	submit(t, c, broker.Request{Action: action(1)})
	settle(t, begin(t, q), 0)
	queued := submit(t, c, broker.Request{Action: action(2)})
	if err := c.Cancel(t.Context(), queued); err != nil {
		t.Fatal(err)
	}
	running := submit(t, c, broker.Request{Action: action(3)})
	l := begin(t, q)
	if err := c.Cancel(t.Context(), running); err != nil {
		t.Fatal(err)
	}
	if err := l.KeepOutput(t.Context(), space.Of([]byte("x")), space.Of(nil)); err != nil {
		t.Fatal(err)
	}
	l.Drop(t.Context())
	records := farm.All(t, "OPERATIONS")
	if len(records) != 3 {
		t.Fatalf("%d records, want 3", len(records))
	}
	for _, record := range records {
		if kept, err := time.ParseDuration(record.Header.Get("Nats-TTL")); err != nil || kept < 10*time.Minute {
			t.Errorf("%s is kept for %v, %v, want at least ten minutes", record.Subject, kept, err)
		}
	}
}
