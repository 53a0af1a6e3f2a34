package brokertest

import (
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"testing"

	"github.com/jetfarm/jetfarm/broker"
)

// StartCluster starts n servers that form one cluster, each on its own files and ports.
func StartCluster(t testing.TB, n int) []*Farm {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	routes := make([]string, n)
	addresses := make([]string, n)
	for i := range n {
		addresses[i] = freeAddress(t)
		routes[i] = "nats://" + addresses[i]
	}
	farms := make([]*Farm, n)
	for i := range n {
		f := &Farm{log: log, config: broker.ServerConfig{
			Dir: t.TempDir(), Name: "n" + strconv.Itoa(i), Listen: "127.0.0.1:0", Cluster: addresses[i], Routes: routes, Log: log,
		}}
		f.start(t)
		t.Cleanup(func() { f.Server.Stop() })
		farms[i] = f
	}
	return farms
}

// freeAddress is a port that nobody listens on, below those that the system gives to connections.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 100 {
		address := "127.0.0.1:" + strconv.Itoa(10_000+rand.IntN(20_000))
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
		if err == nil {
			_ = l.Close()
			return address
		}
	}
	t.Fatal("no port is free")
	return ""
}
