package objectstore_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/broker/brokertest"
	"github.com/jetfarm/jetfarm/cas/objectstore"
)

// Of two that take part, one goes on when the other one ends, at once, and when it falls asleep.
func TestAnotherRotatorTakesOver(t *testing.T) {
	t.Parallel()
	const budget = 8 << 20
	for _, how := range []string{"ends", "sleeps"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			f := brokertest.Start(t)
			p := newProxy(t, f)
			cfg := limited(t, f, budget)
			cfg.Small, cfg.Bulk, cfg.RequestTimeout = p.connect(t), p.connect(t), time.Second
			first := open(t, cfg)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			var running sync.WaitGroup
			running.Go(func() {
				if err := first.Run(ctx); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
			eventually(t, "the first rotates", func() bool { return first.Rotates(t.Context()) })
			second := rotating(t, limited(t, f, budget))
			if how == "ends" {
				cancel(nil)
				running.Wait()
			} else {
				p.silent.Store(true)
			}
			eventually(t, "the second rotates", func() bool { return second.Rotates(t.Context()) })
			fill(t, second, oldest(t, second)+6, 200<<10)
			cancel(nil)
			running.Wait()
		})
	}
}

// Whatever step a rotator died or fell asleep after, another one finishes, and what the first does
// when it wakes up destroys nothing.
func TestRotatorThatWakesUpLate(t *testing.T) {
	t.Parallel()
	const budget = 8 << 20
	f := brokertest.Start(t)
	asleep := open(t, limited(t, f, budget))
	if err := asleep.Turn(t.Context()); err != nil {
		t.Fatal(err)
	}
	stale := asleep.StateOf()
	awake := rotating(t, limited(t, f, budget))
	eventually(t, "the one that is awake rotates", func() bool { return awake.Rotates(t.Context()) })
	fill(t, awake, 9, 200<<10)
	present := put(t, awake, 1000)

	// It decides by what it knew.
	if err := asleep.DropAll(t.Context(), stale); err == nil {
		t.Error("a decision by an overtaken state was written")
	}
	// It had written its decision and goes on with the deed.
	if err := asleep.DeleteDropped(t.Context(), awake.StateOf()); err != nil {
		t.Errorf("deleting dropped generations again: %v", err)
	}
	// It makes the streams of a generation that has come and gone.
	if err := asleep.Make(t.Context(), 2); err != nil {
		t.Errorf("making old streams: %v", err)
	}
	eventually(t, "the streams of a dropped generation are deleted", func() bool {
		_, again := streams(t, newJetStream(t, f.Connect(t)))["OBJ_cas-s-2-0"]
		return !again
	})
	if got := missing(t, awake, present.digest); len(got) != 0 {
		t.Error("a blob of a live generation is missing")
	}
	checkRead(t, awake, present)
	if got := put(t, awake, 2000); len(missing(t, awake, got.digest)) != 0 {
		t.Error("a blob that was just stored is missing")
	}
}

// A rotator dies after each of its steps, and another one goes on from there.
func TestRotatorDiesBetweenSteps(t *testing.T) {
	t.Parallel()
	const budget = 4 << 20
	for _, step := range []string{"made one stream", "made both streams", "wrote the drop", "deleted one stream"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			f := brokertest.Start(t)
			s := rotating(t, limited(t, f, budget))
			fill(t, s, 4, 100<<10)
			js := newJetStream(t, f.Connect(t))
			u, err := s.Usage(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			next := u.Generations[len(u.Generations)-1].Number + 1
			first := u.Generations[0].Number
			switch step {
			case "made one stream", "made both streams":
				for i, bucket := range []string{fmt.Sprintf("cas-s-%d-0", next), fmt.Sprintf("cas-l-%d-0", next)} {
					if i == 1 && step == "made one stream" {
						break
					}
					// The rotator may come first.
					_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
						Name: "OBJ_" + bucket, Subjects: []string{"$O." + bucket + ".C.>", "$O." + bucket + ".M.>"}, AllowDirect: true, AllowRollup: true,
						Discard: jetstream.DiscardNew, Duplicates: 100 * time.Millisecond,
					})
					if err != nil && !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
						t.Fatal(err)
					}
				}
			case "wrote the drop", "deleted one stream":
				eventually(t, "the drop is written", func() bool { return s.WriteDrop(t.Context(), first) == nil })
				if step == "deleted one stream" {
					err := js.DeleteStream(t.Context(), fmt.Sprintf("OBJ_cas-s-%d-0", first))
					if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
						t.Fatal(err)
					}
				}
			}
			other := rotating(t, limited(t, f, budget))
			fill(t, other, next+3, 100<<10)
			for _, s := range []*objectstore.Store{s, other} {
				k := put(t, s, 700<<10)
				checkRead(t, other, k)
			}
			eventually(t, "nothing of the dropped generation is left", func() bool {
				for name := range streams(t, js) {
					if name == fmt.Sprintf("OBJ_cas-l-%d-0", first) || name == fmt.Sprintf("OBJ_cas-s-%d-0", first) {
						return false
					}
				}
				return true
			})
		})
	}
}
