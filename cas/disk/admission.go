package disk

// admission remembers which blobs were read lately, so that those that are read only once are not made
// files of. It knows between remembered and twice as many, and locks nothing.
type admission struct{ young, old map[key]struct{} }

// remembered is a bound on memory: 50 bytes each.
const remembered = 8 << 10

// again reports whether the blob was read lately, and remembers that it is now.
func (a *admission) again(k key) bool {
	_, young := a.young[k]
	_, old := a.old[k]
	if len(a.young) >= remembered || a.young == nil {
		a.young, a.old = make(map[key]struct{}), a.young
	}
	a.young[k] = struct{}{}
	return young || old
}
