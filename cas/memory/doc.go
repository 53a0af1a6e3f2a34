// Package memory is a tier of the CAS in memory: the small blobs of another store, within a byte
// budget.
//
// It holds what is read through it and what is written through it, once the store below has it. What
// is missing is always answered by that store: a blob that is held here may be gone there. Reading it
// then is harmless, since its bytes can be no others; promising it would not be.
//
// Blobs are given out without being copied, so nobody may change what Peek returns.
package memory
