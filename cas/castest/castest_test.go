package castest_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/castest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemory(t *testing.T) {
	castest.Run(t, func(testing.TB) cas.Store { return castest.NewMemory() })
}

func TestFaultyWithoutFaults(t *testing.T) {
	castest.Run(t, func(testing.TB) cas.Store { return &castest.Faulty{Store: castest.NewMemory()} })
}
