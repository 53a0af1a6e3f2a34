// Package contain keeps a panic inside the job in which it happens: a goroutine that works for one job
// must not take the others down with it.
package contain

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// ErrPanic reports a panic. The text has its value and the stack.
var ErrPanic = errors.New("panic")

// Panics returns f with its panics turned into errors that wrap ErrPanic.
func Panics(f func() error) func() error {
	return func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("%w: %v\n%s", ErrPanic, p, debug.Stack())
			}
		}()
		return f()
	}
}
