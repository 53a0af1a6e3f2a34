// Package spool holds bytes whose digest and size are known only at their end: small ones in memory,
// others in a file without a name, so that nothing is left of them however the process ends. All files
// of a pool share one bound.
package spool
