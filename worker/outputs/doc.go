// Package outputs collects what an action has made: the files, directories and symbolic links that its
// command names, its standard output and error.
//
// The tree belongs to code that nobody trusts, so collecting begins when all of its processes are dead,
// never follows a symbolic link, resolves every path below the execution root with openat2, opens
// nothing that is not a regular file or a directory, looks at sizes before content and refuses what
// exceeds the limits. A file is taken from the action's user before it is hashed, so what is hashed is
// what is uploaded and what the disk tier adopts.
//
// Collect hashes and builds the result, Upload makes it durable. What a client must change is
// ErrRefused; every other error is the worker's or the storage's trouble.
package outputs
