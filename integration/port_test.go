package integration_test

import (
	"math/rand/v2"
	"net"
	"strconv"
	"testing"
)

// freePorts returns ports of the loopback address that nobody listens on now. They are below those that
// the system gives to connections, which nobody can keep free.
func freePorts(t testing.TB, n int) []string {
	t.Helper()
	var ports []string
	for range 100 * n {
		port := strconv.Itoa(10_000 + rand.IntN(20_000))
		l, err := net.Listen("tcp", "127.0.0.1:"+port) //nolint:noctx // closed at the end of this function
		if err != nil {
			continue
		}
		defer l.Close()
		if ports = append(ports, port); len(ports) == n {
			return ports
		}
	}
	t.Fatalf("of %d ports %d are free", n, len(ports))
	return nil
}

// freeAddresses is freePorts with the address.
func freeAddresses(t testing.TB, n int) []string {
	t.Helper()
	addresses := freePorts(t, n)
	for i, port := range addresses {
		addresses[i] = "127.0.0.1:" + port
	}
	return addresses
}
