package broker

import (
	"context"

	"github.com/jetfarm/jetfarm/cas"
	"github.com/jetfarm/jetfarm/cas/digest"
	"github.com/nats-io/nats.go"
)

// Client uses what it may and, once, what it may not.
type Client struct {
	conn   *nats.Conn
	blobs  cas.Store
	action digest.Digest
	close  context.CancelCauseFunc
}
