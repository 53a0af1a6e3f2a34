package app_test

import (
	"testing"

	"github.com/jetfarm/jetfarm/cmd/app"
)

func TestGarbageIsBounded(t *testing.T) {
	const most = 512 << 20
	for live, want := range map[uint64]uint64{
		0: 0, 1 << 20: 4 << 20, 100 << 20: 400 << 20, 200 << 20: most, 1 << 30: most, 8 << 30: 4 << 30,
	} {
		got := live * uint64(app.GCPercent(live)) / 100
		if got > want || got < want-want/5 {
			t.Errorf("%d MiB of garbage beside %d MiB, want about %d", got>>20, live>>20, want>>20)
		}
	}
}
