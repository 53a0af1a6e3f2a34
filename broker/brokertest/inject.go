package brokertest

import (
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/jetfarm/jetfarm/broker"
)

// Publish stores a message as any process with access to the broker can.
func (f *Farm) Publish(t testing.TB, subject string, payload []byte) {
	t.Helper()
	f.info(t, "OPERATIONS")
	if _, err := f.js.Publish(t.Context(), subject, payload); err != nil {
		t.Fatalf("publish to %s: %v", subject, err)
	}
}

// Deaf returns a client that is open and does not run: it hears of nothing and mends nothing.
func (f *Farm) Deaf(t testing.TB, cfg broker.Config) *broker.Client {
	t.Helper()
	return f.open(t, f.connect(t, f.URL()), cfg)
}

func (f *Farm) open(t testing.TB, nc *nats.Conn, cfg broker.Config) *broker.Client {
	t.Helper()
	cfg.Conn, cfg.Log = nc, f.log
	c, err := broker.New(cfg)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	if err := c.Open(t.Context()); err != nil {
		t.Fatalf("Open: %v", err)
	}
	return c
}
