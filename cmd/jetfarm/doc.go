// Command jetfarm is a Bazel Remote Execution farm: the whole of it in one process, or one of its
// roles. `jetfarm --help` lists the commands.
package main
