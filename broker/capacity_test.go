package broker_test

import (
	"errors"
	"testing"
	"time"

	"github.com/jetfarm/jetfarm/broker"
	"github.com/jetfarm/jetfarm/broker/brokertest"
)

// TestCapacityIsThatOfTheLeases: a worker's busy slots are its live leases, however they end, and a
// worker that has died has no slots.
func TestCapacityIsThatOfTheLeases(t *testing.T) {
	t.Parallel()
	farm := brokertest.Start(t)
	c := farm.ClientWith(t, broker.Config{AckWait: 300 * time.Millisecond})
	q := brokertest.Queue(t, c, broker.WorkerInfo{Name: "w1", Slots: 100})
	stalled := c.Queue(worker("stalled"))
	n := 0
	submitted := func() string { n++; return submit(t, c, broker.Request{Action: action(n)}) }
	take := func() *broker.Lease { submitted(); return begin(t, q) }
	ends := map[string]func(){
		"settle": func() { settle(t, take(), 0) },
		"hand over": func() {
			if err := take().HandOver(t.Context(), "shutting down"); err != nil {
				t.Fatal(err)
			}
			settle(t, begin(t, q), 0)
		},
		"drop": func() { take().Drop(t.Context()); settle(t, begin(t, q), 0) },
		"exhaust": func() {
			submitted()
			for range broker.MaxAttempts {
				if err := begin(t, q).Return(t.Context(), "x"); err != nil && !errors.Is(err, broker.ErrExhausted) {
					t.Fatal(err)
				}
			}
		},
		"begin too late": func() {
			operation := submitted()
			l := next(t, q)
			if err := c.Cancel(t.Context(), operation); err != nil {
				t.Fatal(err)
			}
			if err := l.Begin(t.Context()); !errors.Is(err, broker.ErrLost) {
				t.Errorf("Begin = %v, want ErrLost", err)
			}
		},
		"settle too late": func() {
			submitted()
			old := begin(t, stalled)
			settle(t, begin(t, q), 0)
			if err := old.Settle(t.Context(), outcome(0)); !errors.Is(err, broker.ErrLost) {
				t.Errorf("Settle = %v, want ErrLost", err)
			}
		},
		"settle what is too large": func() {
			if err := take().Settle(t.Context(), broker.Outcome{Response: make([]byte, broker.MaxResponse+1)}); !errors.Is(err, broker.ErrInvalid) {
				t.Errorf("Settle = %v, want ErrInvalid", err)
			}
			settle(t, begin(t, q), 0)
		},
	}
	for name, end := range ends {
		end()
		for _, worker := range []*broker.Queue{q, stalled} {
			if busy := worker.Busy(); busy != 0 {
				t.Errorf("after %q %d slots are busy", name, busy)
			}
		}
	}
	nothingLeft(t, farm)
}
