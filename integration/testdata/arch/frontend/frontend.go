package frontend

import "github.com/jetfarm/jetfarm/worker"

// Worker is the other side.
type Worker = worker.Worker
