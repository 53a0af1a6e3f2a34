//go:build race

package integration_test

// raceDetector says whether this test binary has the race detector, and so the binary it builds.
const raceDetector = true
