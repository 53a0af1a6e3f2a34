// Package run is the life of a process: signals, services that outlive the work they serve, serving
// HTTP and gRPC within bounds, and the lock on a data directory.
package run
