// Package actioncache keeps the results of actions in a JetStream key-value bucket and the blobs
// that they name in the CAS.
//
// A result is returned only while every blob it names is present: output files, the directories and
// files inside of output directories, stdout and stderr. A result that names an absent blob is as
// good as none, and a storage that can't tell is an error, never a miss. What is stored has been
// checked in the same way, and carries no bytes of files or of stdout and stderr: those are moved
// into the CAS.
//
// The bucket is ac-1; 1 is the version of the layout. Its keys are
// `<key space token>.<hash>.<size>` of the action. A value is one byte and what that says follows:
// 1 the serialized ActionResult, 2 the serialized Digest of a blob that has it, for results that
// are too large for a message. The bucket has a size, and the entries that were written the longest
// time ago give way; one that is used is written again once a day. An entry whose blobs are gone stays
// until its turn comes: the blobs may be stored again, and are by whoever builds the action again.
//
// Entries that were used a short time ago are also kept in memory, with the list of blobs to ask for.
// The broker republishes the headers of each write on jetfarm.ac.<key>, which keeps the memories of all
// processes current: a change is seen when its news arrive, before the writer has its acknowledgement.
// A connection that is silently dead is noticed after 30 s, and entries that an operator deletes
// from the bucket, of which the broker tells nothing, are served for up to a minute while their blobs
// are there.
package actioncache
