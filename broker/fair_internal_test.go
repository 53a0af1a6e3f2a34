package broker

import (
	"fmt"
	"testing"
)

func TestFairQueueTakesTurns(t *testing.T) {
	var q fairQueue
	push := func(tenant, build string, n int) {
		for i := range n {
			q.push(&waiting{operation: fmt.Sprintf("%s/%s/%d", tenant, build, i), flow: flow{tenant, build}})
		}
	}
	push("a", "huge", 1000)
	push("a", "small", 10)
	push("b", "only", 10)
	taken := map[flow]int{}
	for range 40 {
		taken[q.pop().flow]++
	}
	// Ten turns each of a's builds and twenty of b, who had ten.
	if taken[flow{"b", "only"}] != 10 || taken[flow{"a", "small"}] != 10 || taken[flow{"a", "huge"}] != 20 {
		t.Errorf("of 40 turns %v", taken)
	}
	if q.size != 980 || q.builds != 1 {
		t.Errorf("%d jobs of %d builds are left, want 980 of 1", q.size, q.builds)
	}
	for range 980 {
		q.pop()
	}
	if w := q.pop(); w != nil || q.size != 0 || q.builds != 0 || len(q.named) != 0 {
		t.Errorf("an empty queue gives %v and counts %d", w, q.size)
	}
}

func TestFairQueueHeedsPriority(t *testing.T) {
	var q fairQueue
	for i, priority := range []int32{3, -1, 0, 3, -7} {
		q.push(&waiting{operation: fmt.Sprint(i), priority: priority})
	}
	order := ""
	for w := q.pop(); w != nil; w = q.pop() {
		order += w.operation
	}
	if order != "41203" {
		t.Errorf("order %s, want 41203", order)
	}
}

func TestFairQueueForgetsWhatIsRemoved(t *testing.T) {
	var q fairQueue
	var jobs []*waiting
	for i := range 100 {
		w := &waiting{operation: fmt.Sprint(i), flow: flow{build: fmt.Sprint(i % 10)}}
		jobs = append(jobs, w)
		q.push(w)
	}
	for i, w := range jobs {
		if i%10 < 5 || i%2 == 0 {
			q.remove(w)
		}
	}
	again := &waiting{operation: "again", flow: flow{build: "1"}}
	q.push(again) // of a build that had lost all it had
	n := 0
	for w := q.pop(); w != nil; w = q.pop() {
		if w.gone {
			t.Fatalf("%s was removed and is given out", w.operation)
		}
		n++
	}
	if n != 31 || q.size != 0 || q.builds != 0 {
		t.Errorf("%d jobs were given out, %d are left, want 31 and 0", n, q.size)
	}
}

// TestFairQueueKeepsNothingOfWhatIsRemoved although no turn comes.
func TestFairQueueKeepsNothingOfWhatIsRemoved(t *testing.T) {
	var q fairQueue
	first := &waiting{flow: flow{tenant: "a", build: "a"}}
	q.push(first)
	for i := range 10_000 {
		for _, f := range []flow{{"a", "a"}, {"a", fmt.Sprint(i)}, {fmt.Sprint(i), "a"}} {
			w := &waiting{flow: f, priority: 1}
			q.push(w)
			q.remove(w)
		}
	}
	a := q.named["a"]
	if len(q.named) > 100 || len(q.turns.in)+len(q.turns.out) > 100 || len(a.named) > 100 || len(a.turns.in)+len(a.turns.out) > 100 || len(a.named["a"].jobs) > 100 {
		t.Errorf("one job waits, and there are %d tenants with %d turns, %d builds and %d jobs",
			len(q.named), len(q.turns.in), len(a.named), len(a.named["a"].jobs))
	}
	if q.size != 1 || q.builds != 1 || q.pop() != first || q.pop() != nil || q.builds != 0 || len(q.named) != 0 {
		t.Errorf("%d jobs of %d builds are left", q.size, q.builds)
	}
}

// BenchmarkFairQueue is a push and a pop while n jobs of 100 builds wait.
func BenchmarkFairQueue(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(fmt.Sprintf("waiting=%d", n), func(b *testing.B) {
			var q fairQueue
			for i := range n {
				q.push(&waiting{flow: flow{build: fmt.Sprint(i % 100)}})
			}
			b.ReportAllocs()
			for b.Loop() {
				w := q.pop()
				w.arrived = 0
				q.push(w)
			}
		})
	}
}
