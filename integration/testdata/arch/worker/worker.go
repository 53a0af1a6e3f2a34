package worker

import (
	"github.com/nats-io/nats.go"
)

// Worker uses NATS, which is behind broker.
type Worker struct{ conn *nats.Conn }

// Run starts what it does not wait for.
func (w *Worker) Run() {
	go w.conn.Close()
}
