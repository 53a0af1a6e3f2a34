// Package digest is the name of a blob: which key space it lives in, its hash and its size.
//
// It owns the two textual forms of that name, REAPI's Digest message and the ByteStream resource
// names, and their limits. Every digest that enters the farm passes through this package, so a
// Digest value is always well formed: lower-case hex of the right length, a size that is not
// negative, an instance name that is short and has no reserved segment. Code that holds a Digest
// may therefore put it into a subject, a file name or a log line without looking at it again.
//
// The package imports nothing else of this module and does no I/O.
package digest
