// Package pack keeps copies of small blobs in few large files of a process's data directory.
//
// A broker reads a block of several MiB to give out one small blob that nobody has asked for lately. A
// pack reads that blob alone: where it is follows from a table in memory, and one read brings it. Blobs
// are appended to segments, and when there is no more room the oldest segment is deleted with all that
// it holds. Nothing is ever rewritten and nothing waits for the disk.
//
// A pack is a cache and promises nothing. Its files may be deleted, torn or damaged at any time, by a
// kill, a power cut or a bad disk: what Get returns was compared with its digest, and everything else is
// as if it had never been kept. After a kill the segment that was written to is read once, record by
// record; the tables of the others are in files beside them.
//
// Copies give way before originals: a pack gives room back while its disk has less than a sixteenth
// free, which is more than what makes the farm evict blobs, and takes nothing for a while after a write
// that failed.
package pack
