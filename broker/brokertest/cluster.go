package brokertest

import (
	"fmt"
	"log/slog"
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

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(fmt.Errorf("free port: %w", err))
	}
	defer l.Close() //nolint:errcheck // the port is free again either way
	return l.Addr().String()
}
