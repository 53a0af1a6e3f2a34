// Package inputs reads the input root of an action, checks it and lays it out in a directory.
//
// Everything in an input root comes from a client and is checked before anything is created: names
// that would leave the root, duplicates, an order that is not canonical, malformed digests, and trees
// that are larger than the limits, including small sets of directories that refer to each other so
// often that the tree they describe is huge. What is wrong is ErrInvalid and names the directory and
// the entry. What is absent from the storage is a MissingError that lists all of it.
//
// Parsed directories are kept in a cache by digest: most of an input root was in the one before.
package inputs
