package fetch

import "net/netip"

// CheckAddress is guard.check.
func CheckAddress(allowed []netip.Prefix, a netip.Addr) error { return guard{allowed}.check(a) }
