// Package brokertest starts a real broker for a test: an embedded NATS server with file storage in
// the test's directory, which ends with the test.
package brokertest
