// Package unpack turns archives that nobody vouches for into directories in the CAS.
//
// An archive is refused as a whole when any name in it is absolute, climbs with `..`, is no valid name
// of a REAPI directory or comes twice, when a link leads out of the directory, or when it has anything
// but files, directories and links. Nothing is written to a file system by a name of the archive.
// Entries, depth, names and unpacked bytes are bounded, so that a small archive cannot become a large
// problem.
package unpack
