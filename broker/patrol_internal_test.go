package broker

import (
	"fmt"
	"testing"
	"time"
)

// TestIdleWorkersShareTheirPatrols: however many they are, they pull about as often, and those that alone
// serve a pool look once a second.
func TestIdleWorkersShareTheirPatrols(t *testing.T) {
	all := Platform{{Name: "rare", Value: "1"}}
	for n := range maxPools - 2 {
		all = append(all, Property{Name: "x", Value: fmt.Sprint(n)})
	}
	for _, workers := range []int{1, 10, 100, 2000} {
		var v view
		v.init()
		for _, p := range all {
			v.pools[Platform{p}.pool()] = Platform{p}
		}
		add := func(name string, info WorkerInfo) {
			info.Name, info.Slots = name, 1
			v.workers[name] = seenWorker{info: info, at: time.Now()}
		}
		for n := range workers {
			add(fmt.Sprint("idle", n), WorkerInfo{Platform: all[1:]})
			add(fmt.Sprint("busy", n), WorkerInfo{Platform: all, Busy: 1})
			add(fmt.Sprint("drained", n), WorkerInfo{Platform: all, Draining: true})
			add(fmt.Sprint("broken", n), WorkerInfo{Platform: all, Trouble: "no disk"})
		}
		add("alone", WorkerInfo{Platform: all[:1]})
		shares := v.shares(laneLooks)
		if len(shares) != maxPools {
			t.Fatalf("shares of %d pools, want %d", len(shares), maxPools)
		}
		pulls := 0.0
		for pool, share := range shares {
			serving := workers
			switch pool {
			case defaultPool:
				serving++
			case all[:1].pool():
				serving = 1
				if share != 1 {
					t.Errorf("the only worker of a pool looks %v times a second", share)
				}
			}
			if looks := share * float64(serving); looks < min(float64(serving), laneLooks)*0.99 {
				t.Errorf("a lane of %s, which %d workers serve, is looked into %v times a second", pool, serving, looks)
			}
			pulls += share * float64(serving) * lanes
		}
		if pulls > farmPulls*1.01 {
			t.Errorf("%d workers pull %.0f times a second", workers, pulls)
		}
	}
}
