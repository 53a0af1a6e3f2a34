package fetch

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
)

// ErrBlocked reports an address that is not fetched from.
var ErrBlocked = errors.New("address is not allowed")

// guard decides which addresses are dialled.
type guard struct{ allowed []netip.Prefix }

// special are the networks without hosts of the public Internet, by IANA's registries of special
// purpose addresses, and those that lead into them by translation.
var special = prefixes( //nolint:gochecknoglobals // a table that nothing changes
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
	"192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
	"198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
	"2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
)

// global is where IPv6 has hosts of the public Internet: all else is special.
var global = netip.MustParsePrefix("2000::/3") //nolint:gochecknoglobals // a constant

func prefixes(texts ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(texts))
	for i, text := range texts {
		out[i] = netip.MustParsePrefix(text)
	}
	return out
}

// check returns an error that wraps ErrBlocked for an address that is neither public nor allowed.
func (g guard) check(a netip.Addr) error {
	plain := a.Unmap().WithZone("")
	for _, p := range g.allowed {
		if p.Contains(plain) {
			return nil
		}
	}
	public := plain.IsValid() && (plain.Is4() || global.Contains(plain))
	for _, p := range special {
		public = public && !p.Contains(plain)
	}
	if !public {
		return fmt.Errorf("%w: %v is not a public address (the farm's operator allows others with --fetch-allow)", ErrBlocked, plain)
	}
	return nil
}

// control is net.Dialer.Control: it sees the address that the socket is about to connect to.
func (g guard) control(_, address string, _ syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: %q", ErrBlocked, address)
	}
	return g.check(to.Addr())
}
