// Package disk is a local tier of the CAS: blobs of another store as files, within a byte budget,
// handed out as hard links.
//
// A file's name says everything about it (key space, hash, size, executable or not, and a
// generation that no other file has), so the directory is the index: Open lists names and reads no
// file. A file appears under its name by one rename, after its bytes were verified, and a process
// that is killed leaves at most files in tmp, which the next Open wipes. Nothing is synced: a blob
// that a power cut damaged can be fetched again. Files from before the machine's last boot are
// therefore hashed again before their first use.
//
// Files are read-only and, when the worker is root, owned by root, so that another user who gets a
// link can neither write nor chmod them. The executable variant of a blob is a file of its own,
// because links share their mode.
//
// The tier holds nothing open and pins nothing. A link either succeeds, after which eviction can't
// hurt it, or finds the name gone, which drops the entry of that generation and fetches again.
package disk
