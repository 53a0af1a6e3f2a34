package actioncache

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/jetfarm/jetfarm/cas/digest"
)

// newsPrefix is where the broker tells every write to the bucket, after it was stored and before it
// is acknowledged: the key follows, and the headers have the sequence.
const newsPrefix = "jetfarm.ac."

// newsChannel is how many news wait to be applied.
const newsChannel = 8192

// Run keeps the memory current, and everything Get needs is in it from its start on. Without Run, and
// while the broker can't be reached, nothing is kept. It returns nil after ctx has ended.
func (c *Cache) Run(ctx context.Context) error {
	if c.memory == nil {
		<-ctx.Done()
		return nil
	}
	news := make(chan *nats.Msg, newsChannel)
	sub, err := c.conn.ChanSubscribe(newsPrefix+">", news)
	if err != nil {
		return fmt.Errorf("action cache: %w", failure(ctx, err))
	}
	slow := sub.StatusChanged(nats.SubscriptionSlowConsumer)
	connection := c.conn.StatusChanged()
	defer func() {
		c.conn.RemoveStatusListener(connection)
		c.memory.empty(false)
		if err := sub.Unsubscribe(); err != nil && !c.conn.IsClosed() {
			c.log.WarnContext(ctx, "unsubscribe from changes of the action cache", "err", err)
		}
	}()
	c.follow(ctx)
	var last uint64 // the sequence of the last news
	for {
		select {
		case m := <-news:
			last = c.apply(m, last)
		case _, ok := <-connection:
			if !ok {
				connection = nil
			}
			c.follow(ctx)
			last = 0
		case _, ok := <-slow:
			if !ok {
				slow = nil
			}
			c.memory.empty(true)
			last = 0
		case <-ctx.Done():
			return nil
		}
	}
}

// follow empties the memory and lets it fill again if the broker is known to have the subscription.
// What the event was is no matter: several may have happened since.
func (c *Cache) follow(ctx context.Context) {
	c.memory.empty(false)
	if !c.conn.IsConnected() {
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, errNoAnswer)
	defer cancel()
	if err := c.conn.FlushWithContext(ctx); err != nil {
		c.log.DebugContext(ctx, "changes of the action cache are not followed", "err", err)
		return
	}
	c.memory.empty(true)
}

// apply enters one change and returns its sequence. Every message of the bucket is told, so a jump in
// the sequences is a loss.
func (c *Cache) apply(m *nats.Msg, last uint64) uint64 {
	sequence, err := strconv.ParseUint(m.Header.Get(jetstream.SequenceHeader), 10, 64)
	if err != nil {
		return last // not from the broker
	}
	if last != 0 && sequence != last+1 {
		c.memory.empty(true)
	}
	if action, ok := parseKey(strings.TrimPrefix(m.Subject, newsPrefix)); ok {
		c.memory.changed(action, sequence)
	}
	return sequence
}

// key names an action in the bucket.
func key(action digest.Digest) string {
	return action.Space().Token() + "." + action.Hash() + "." + strconv.FormatInt(action.Size(), 10)
}

// parseKey is the inverse of key.
func parseKey(key string) (digest.Digest, bool) {
	token, rest, _ := strings.Cut(key, ".")
	hash, text, _ := strings.Cut(rest, ".")
	size, err := strconv.ParseInt(text, 10, 64)
	if err != nil || strconv.FormatInt(size, 10) != text {
		return digest.Digest{}, false
	}
	space, err := digest.ParseToken(token)
	if err != nil {
		return digest.Digest{}, false
	}
	action, err := space.New(hash, size)
	return action, err == nil
}

// kept returns what is known of an action and the epoch in which more can be learnt.
func (c *Cache) kept(action digest.Digest, now time.Time) (*known, uint64) {
	if c.memory == nil {
		return nil, 0
	}
	return c.memory.get(action, now)
}

// keep remembers an entry that was asked for, or written, in this epoch and at this time.
func (c *Cache) keep(action digest.Digest, k *known, epoch uint64, asked time.Time) {
	if c.memory == nil {
		return
	}
	sequence := k.sequence
	if !k.whole {
		k = nil
	}
	c.memory.add(action, sequence, k, epoch, asked)
}

// doubt forgets an entry after a write whose outcome is not known, or that was removed.
func (c *Cache) doubt(action digest.Digest) {
	if c.memory != nil {
		c.memory.doubt(action)
	}
}
