// Package worker starts a goroutine that nobody waits for.
package worker
