// Package sandbox runs one command at a time in each of a number of slots and leaves nothing of it
// behind: when Run returns, every process the command started is dead, however it ended and whatever
// it did to get away.
//
// How strongly a command is held apart from the worker and from its neighbours is the pool's Mode,
// probed by doing when the pool is opened. In all modes a command gets exactly the environment it is
// given, an empty standard input, a session of its own, umask 022 and no way to gain privileges by
// set-user-ID files. Standard output and error are files, so no process that holds them can delay
// the end of a run.
//
// ModeUID adds a user of its own: each slot has a user ID that no other slot on this host has, claimed
// with a file lock. Files of other users, such as read-only hard links of cached blobs, can't be
// changed, and the slot's processes are found and killed by their user, which they can't change.
// What a run leaves in /tmp and its like is removed by its owner; System V IPC objects are not.
//
// ModeNamespaces adds a mount and an IPC namespace per run: the execution root appears at Mountpoint
// whatever the path on the host and its permissions are, /tmp, /var/tmp and /run/lock are one private
// directory, and /dev/shm is a private tmpfs. Not isolated in this mode are process IDs (other
// processes are visible but can't be signalled), the network, the host name and the rest of the host's
// files, which stay readable as far as their permissions allow.
//
// ModeNone runs commands as the worker's own user. It is for machines on which the worker is not root.
// A command could change everything that the worker can: its inputs must be private copies. Processes
// are found by session, process group, parent, working directory and standard output; one that changes
// all of these escapes.
package sandbox
