// Package fetch downloads from origins that clients name, for clients that are not trusted to choose
// them.
//
// A Fetcher connects to public addresses only, unless its operator allows more. The address is
// checked when it is dialled, after all name resolution and on every redirect, so a name that resolves
// to something else the second time gains nothing. What clients give to be sent along, such as
// credentials, is sent to the origin that they named and to no other. Sizes, times and redirects are
// bounded, and no proxy of the environment is used.
package fetch
