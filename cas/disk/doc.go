// Package disk is a local tier of the CAS: blobs of another store as files, within a byte budget,
// handed out as hard links to workers and as streams to the clients of front ends.
//
// A file's name says everything about it (key space, hash, size, executable or not, a CRC-32C of its
// bytes, and a generation that no other file has), so the directory is the index: Open lists names and
// reads no file. A file appears under its name by one rename, after its bytes were verified, and a process
// that is killed leaves at most files in tmp, which the next Open wipes. Nothing is synced: a blob
// that a power cut damaged can be fetched again. Files from before the machine's last boot are
// therefore hashed again before their first use; reads of the others compare the CRC, which finds every
// accident and costs a tenth of the hash. Who can write the files could forge it, but that is nobody: see
// below.
//
// Files are read-only and, when the worker is root, owned by root, so that another user who gets a
// link can neither write nor chmod them. The executable variant of a blob is a file of its own,
// because links share their mode.
//
// The tier holds nothing open and pins nothing. A link or an open either succeeds, after which eviction
// can't hurt it, or finds the name gone, which drops the entry of that generation and fetches again.
//
// A blob that is not held is fetched once for all who ask, see flight, and a file system that fails or is
// full makes reads go on with the source alone.
package disk
