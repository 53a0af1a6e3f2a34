// Package objectstore is the CAS in JetStream object store buckets: the farm's durable layer.
//
// Every bucket is a standard object store whose object names are the REAPI read names of the blobs,
// so stock NATS clients list and read it. Blobs of at most 512 KiB are one message under a subject
// that follows from the digest, and reading one is a single direct get. Larger blobs are chunks
// under the subject of one upload with metadata written last, and are read in windows of direct
// gets; no consumer is ever made. Small and large blobs live in different streams and travel on
// different connections, so that a large one never delays a small one.
//
// Whether a blob exists is answered from an index in memory. Open builds it from the subjects that
// the streams hold, announcements on SubjectIndex keep it current between processes, and Run lists
// the live generations again after every gap. The index may forget a blob, which costs an upload
// that ends early. What it calls present was verified and stored; should the broker have lost it, it
// is forgotten everywhere by the next listing or the first read that finds nothing.
//
// Streams belong to generations, which are numbered from 1. Writes go to the newest, reads ask all
// that live.
//
// A publish that is refused because the subject already holds a message is the proof that another
// writer was first; no blob is ever written twice, so no reader sees its blob change. The rejected
// alternative is the put of the stock client, which replaces objects and so cuts off their readers.
package objectstore
