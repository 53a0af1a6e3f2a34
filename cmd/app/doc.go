// Package app is the composition root: the command line, and one function per command that puts the
// parts together and runs them.
//
// Each command is one struct that is at once its flags, its JETFARM_* environment variables and its
// keys in the file of --config. Run may be called from a test as from main: it touches no signals
// and no global state besides the Go runtime's memory settings.
package app
