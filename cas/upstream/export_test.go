package upstream

import "time"

// SmallBlob is up to which size a blob travels in one message.
const SmallBlob = smallBlob

// WindowBytes is how much of a fetch is kept for readers that are behind.
const WindowBytes = windowBytes

// Flights returns how many fetches are going on, and how many callers they have.
func (t *Tier) Flights() (flights, callers int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.flights {
		callers += f.callers
	}
	return len(t.flights), callers
}

// Promised returns how many blobs are on their way for results.
func (t *Tier) Promised() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.promised)
}

// Down tells whether the upstream counts as down.
func (c *Client) Down() bool {
	_, err := c.health.able()
	return err != nil
}

// SetPatience sets how long a fetch waits for slow readers. It must be called before Run.
func (t *Tier) SetPatience(d time.Duration) { t.patience = d }
