// Package history decides whether a farm kept its promises while its processes were killed, frozen and
// cut off. A History holds what every client saw of every stream, the states that the broker told, how
// often each action ran and what was left at the end; Check names what must not be. It does not know how
// the history came about.
package history
