// Package integration tests the whole farm from the outside, as its users have it: the roles are
// processes of the real binary, the client is a real Bazel, and what connects them are loopback
// sockets. It has no code of its own.
//
// The tests kill processes, restart the farm on its data and look at what the client saw. A test
// that needs Bazel fails where Bazel is missing and says how to install it; none is skipped.
//
// The package also holds what is true of the source as a whole: arch_test.go checks which package
// may import which and who may start a goroutine.
package integration
