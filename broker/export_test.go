package broker

import "time"

// SetPullBound shortens the bound of a pull.
func (q *Queue) SetPullBound(d time.Duration) { q.bound = d }
