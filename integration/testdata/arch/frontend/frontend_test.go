package frontend_test

import "github.com/jetfarm/jetfarm/worker"

var _ worker.Worker
