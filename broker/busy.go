package broker

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// answerEvery is how often who asks for watchers is answered in place of those that are busy; several
// times within answerBound.
const answerEvery = answerBound / 4

// busy are the watchers that do not look at their messages, because whoever watches is busy with the last
// state: a client that takes nothing from its stream may be so for minutes. They have not left, and are
// spoken for.
type busy struct {
	mu       sync.Mutex
	watchers map[*watcher]struct{} // guarded by mu
}

func (b *busy) enter(w *watcher) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.watchers == nil {
		b.watchers = make(map[*watcher]struct{})
	}
	b.watchers[w] = struct{}{}
}

func (b *busy) leave(w *watcher) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.watchers, w)
}

// questions takes what has come for the busy watchers and returns the questions among it by watcher.
// While a watcher is in b it does not touch them itself.
func (b *busy) questions() map[*watcher][]*nats.Msg {
	b.mu.Lock()
	defer b.mu.Unlock()
	asked := make(map[*watcher][]*nats.Msg)
	for w := range b.watchers {
		for len(w.messages) > 0 {
			if m := <-w.messages; question(m) {
				asked[w] = append(asked[w], m)
			} else {
				w.behind = true
			}
		}
	}
	return asked
}

// answerForBusy answers in place of busy watchers until ctx ends.
func (c *Client) answerForBusy(ctx context.Context) error {
	ticker := time.NewTicker(answerEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		for w, messages := range c.busy.questions() {
			for _, m := range messages {
				w.answer(ctx, m)
			}
		}
	}
}
